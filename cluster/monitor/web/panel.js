// A panel: its title and help, and below them large values, charts with legends, or why there is nothing.

import { Chart, called, element, swatch } from "./chart.js";
import { format } from "./units.js";

const MOST_STACKS = 4;
const TALL = 185, LOW = 130; // px, of a chart and of each of several
const IN_TITLE = { "images/s": "images/s", "1/s": "per second" }; // units that ticks do not name

let helps = 0;

/** `host`: its element. `show` is called with what /api/panel answers, `fail` when it does not. */
export class PanelView {
  constructor(panel) {
    this.panel = panel;
    this.places = new Map(); // a series' name -> its place among the colours, for as long as the page is open
    this.charts = new Map(); // a stack's run, or "" -> {chart, legend, host}
    this.asked = -Infinity;
    this.seen = true;
    this.body = element("div", { class: "body" });
    this.note = element("p", { class: "note", hidden: "" });
    const names = { class: `panel ${panel.kind}${panel.name ? " named" : ""}`, "data-panel": panel.key };
    this.host = element("article", names, ...this.head(), this.body, this.note);
    this.body.append(element("p", { class: "nothing" }, "loading"));
    this.sight = new IntersectionObserver(([entry]) => (this.seen = entry.isIntersecting), { rootMargin: "300px" });
    this.sight.observe(this.host);
  }

  head() {
    const { title, unit, kind, help } = this.panel;
    const id = `help-${helps++}`;
    const heading = element("h3", {}, title);
    if (kind !== "stat" && IN_TITLE[unit]) heading.append(" ", element("span", { class: "unit" }, IN_TITLE[unit]));
    const button = element("button", { type: "button", "aria-expanded": "false", "aria-controls": id,
      "aria-label": `What ${title} says`, title: help }, "?");
    const text = element("p", { id, class: "help", hidden: "" }, help);
    button.addEventListener("click", () => {
      text.hidden = !text.hidden;
      button.setAttribute("aria-expanded", String(!text.hidden));
    });
    return [element("header", {}, heading, button), text];
  }

  /** Whether it is to be asked for now, `patience` ms after the last time if it is a chart. */
  due(anew, patience) {
    if (anew || this.asked === -Infinity) return true;
    return this.seen && (this.panel.kind === "stat" || performance.now() - this.asked >= patience);
  }

  show(answer, runs, oneRun) {
    this.asked = performance.now();
    this.host.removeAttribute("data-trouble");
    this.say(answer.left_off && `the ${answer.series.length} largest of ${answer.series.length + answer.left_off}`);
    const series = answer.series.filter((one) => one.points.some(([, value]) => value !== null));
    const present = new Set(series.map((one) => one.labels.run));
    const brief = oneRun || (runs.length <= 1 && present.size <= 1);
    if (!series.length) this.empty();
    else if (this.panel.kind === "stat") this.large(series, brief);
    else if (this.panel.kind === "stack") this.stacks(series, answer, brief);
    else this.lines(series, answer, brief, runs);
    this.host.dataset.drawn = series.length ? this.panel.kind : "nothing";
  }

  /** What was shown stays. */
  fail(text) {
    this.host.dataset.trouble = "";
    this.asked = -Infinity;
    this.say(text);
  }

  close() {
    this.sight.disconnect();
    this.clear();
  }

  clear() {
    this.charts.forEach(({ chart }) => chart.close());
    this.charts.clear();
    this.body.replaceChildren();
  }

  empty() {
    this.clear();
    const words = this.panel.empty ? `nothing ${this.panel.empty}` : "no data yet";
    this.body.append(element("p", { class: "nothing" }, words));
  }

  say(text) {
    this.note.hidden = !text;
    this.note.textContent = text || "";
  }

  large(series, brief) {
    const { unit, high, name } = this.panel;
    const rows = series.map((one) => {
      const text = brief ? one.short : one.legend;
      if (name) return element("li", {}, element("b", {}, called(text)));
      const value = one.points.at(-1)[1];
      const small = unit === "images/s" ? [" ", element("small", {}, unit)] : [];
      const row = element("li", {}, element("b", {}, format(value, small.length ? "" : unit), ...small));
      if (unit === "ratio" && high === 1) row.append(bar(value));
      if (text) row.append(called(text));
      return row;
    });
    const names = `values${name ? " names" : ""}${rows.length > 2 ? " many" : ""}`;
    this.body.replaceChildren(element("ul", { class: names }, ...rows));
  }

  lines(series, answer, brief, runs) {
    if (this.panel.legends.every((legend) => legend === "{{run}}")) runs.forEach((run) => this.place(run));
    const name = (one) => (brief ? one.short : one.legend);
    const named = series.map((one) => ({ ...one, name: name(one), place: this.place(one.legend) }));
    this.draw(new Map([["", named]]), answer, TALL);
  }

  // Parts of a whole: of each run its own.
  stacks(series, answer, brief) {
    const byRun = new Map();
    for (const one of series) {
      const key = brief ? "" : one.labels.run ?? "";
      if (!byRun.has(key)) byRun.set(key, []);
      byRun.get(key).push({ ...one, name: one.short || one.legend, place: this.place(one.short) });
    }
    const kept = [...byRun].slice(0, MOST_STACKS);
    this.draw(new Map(kept), answer, byRun.size > 1 ? LOW : TALL);
    if (byRun.size > kept.length) this.say(`${byRun.size - kept.length} more runs; choose one`);
  }

  draw(groups, answer, height) {
    if ([...groups.keys()].join("\n") !== [...this.charts.keys()].join("\n") || this.height !== height) {
      this.clear();
      this.height = height;
      for (const run of groups.keys()) {
        const plot = element("div", { class: "plot" }), legend = element("ul", { class: `legend ${this.panel.kind}` });
        this.body.append(...(run && groups.size > 1 ? [element("h4", {}, called(run))] : []), plot, legend);
        this.charts.set(run, { chart: new Chart(plot, this.panel, height), legend });
      }
    }
    for (const [run, series] of groups) {
      const { chart, legend } = this.charts.get(run);
      chart.update(series, answer.start, answer.end);
      legend.replaceChildren(...series.map((one) => this.entry(one)));
    }
  }

  entry({ name, place, points }) {
    const last = points.findLast(([, value]) => value !== null)[1];
    const over = points.at(-1)[1] === null ? { class: "over", title: "its last value; there is none now" } : {};
    return element("li", over, swatch(place, this.panel.kind), called(name || "latest"),
      element("b", {}, format(last, this.panel.unit)));
  }

  place(name) {
    if (!this.places.has(name)) this.places.set(name, this.places.size);
    return this.places.get(name);
  }
}

function bar(share) {
  const inner = element("span", {});
  inner.style.width = `${Math.min(Math.max(share ?? 0, 0), 1) * 100}%`;
  return element("span", { class: "bar", "aria-hidden": "true" }, inner);
}
