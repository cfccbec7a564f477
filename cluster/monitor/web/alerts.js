// The alerts that fire, at the top of the page; those that are about to, on request.

import { element } from "./chart.js";
import { moment } from "./units.js";

const SHOWN = 3; // the rest on request

export class Alerts {
  constructor(host) {
    Object.assign(this, { host, before: "" });
  }

  /** `found`: what /api/alerts answers, the worst first. */
  show(found) {
    const text = JSON.stringify(found);
    if (text === this.before) return; // what is unfolded stays so
    this.before = text;
    const firing = found.filter((alert) => alert.state === "firing");
    const pending = found.filter((alert) => alert.state !== "firing");
    const open = new Set([...this.host.querySelectorAll("details[open]")].map((one) => one.dataset.of));
    const parts = [element("ul", {}, ...firing.slice(0, SHOWN).map(line))];
    const more = firing.slice(SHOWN);
    if (more.length) parts.push(folded("firing", `${more.length} more fire`, more, open));
    if (pending.length) parts.push(folded("pending", `${pending.length} may fire soon`, pending, open));
    this.host.replaceChildren(...parts);
    this.host.hidden = !found.length;
  }
}

function folded(of, summary, found, open) {
  const list = element("ul", {}, ...found.map(line));
  const made = element("details", { "data-of": of }, element("summary", {}, summary), list);
  made.open = open.has(of);
  return made;
}

function line({ name, state, severity, summary, runbook, since }) {
  const kind = severity === "critical" ? "critical" : "warning";
  const when = `${state === "firing" ? "" : "would fire, "}since ${moment(new Date(since) / 1000)}`;
  return element("li", { class: state === "firing" ? kind : "pending" }, element("b", {}, severity || "alert"),
    element("span", {}, summary || name), element("small", {}, runbook ? `${when}; see ${runbook}` : when));
}
