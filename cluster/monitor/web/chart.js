// A chart over time as SVG: lines or stacked areas on two axes, with a crosshair that says all values at its time.

import { format, moment, timeAxis, valueAxis } from "./units.js";

export const COLOURS = 8; // of page.css; further series have the same colours and another stroke
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
const TICK_PX = 30; // between two ticks of the y axis, at least
const MOST_SAID = 14; // values beside a crosshair
const LONGEST = 56; // characters of a name
const pen = document.createElement("canvas").getContext("2d");
let pointed = null; // the chart that has a crosshair

document.addEventListener("pointerdown", (event) => {
  if (pointed && !pointed.host.contains(event.target)) pointed.leave();
});

function svg(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** An element of HTML; children that are strings become text. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** A series' name; of a long one its beginning and its end, where series of one run differ. */
export function called(name) {
  const text = name.length > LONGEST ? `${name.slice(0, 20)}…${name.slice(21 - LONGEST)}` : name;
  return element("span", { class: "name", ...(text !== name && { title: name }) }, text);
}

/** The stroke that stands for a series: `place` is its number among those of its panel. */
export function swatch(place, kind) {
  const at = kind === "stack" ? { x: 1, y: 1, width: 18, height: 10 } : { x1: 0, x2: 20, y1: 6, y2: 6 };
  const sign = svg(kind === "stack" ? "rect" : "line", { ...at, ...stroke(place) });
  return svg("svg", { class: `swatch ${kind}`, width: 20, height: 12, "aria-hidden": "true" }, sign);
}

function stroke(place) {
  const dash = DASHES[Math.floor(place / COLOURS) % DASHES.length];
  return { class: `s${place % COLOURS}${place < COLOURS ? "" : " again"}`, ...(dash && { "stroke-dasharray": dash }) };
}

export class Chart {
  /** In `host`, an empty element. `panel`: as /api/boards has it. */
  constructor(host, panel, height) {
    Object.assign(this, { host, panel, height, width: 0, series: [], index: null });
    this.picture = svg("svg", { role: "img", tabindex: 0 });
    this.said = element("div", { class: "said", hidden: "" });
    host.append(this.picture, this.said);
    this.picture.addEventListener("pointermove", (event) => this.point(event));
    this.picture.addEventListener("pointerdown", (event) => this.point(event));
    this.picture.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.leave());
    this.picture.addEventListener("blur", () => this.leave());
    this.picture.addEventListener("keydown", (event) => this.key(event));
    this.sizes = new ResizeObserver(([entry]) => {
      const width = Math.floor(entry.contentRect.width);
      if (width && width !== this.width) {
        this.width = width;
        this.draw();
      }
    });
    this.sizes.observe(host);
  }

  /** `series`: [{name, place, points}] on one grid of times; `start` and `end`: of the time axis. */
  update(series, start, end) {
    Object.assign(this, { series, start, end, times: series[0].points.map(([time]) => time) });
    const values = () => series.map((one) => one.points.map(([, value]) => value));
    this.tops = this.panel.kind === "stack" ? stacked(series) : values();
    if (this.index !== null) this.index = Math.min(this.index, this.times.length - 1);
    if (this.width) this.draw();
  }

  close() {
    this.leave();
    this.sizes.disconnect();
  }

  draw() {
    if (!this.series.length) return;
    const { width, height } = this;
    const axis = this.axis(height - 33);
    pen.font = `11px ${getComputedStyle(this.host).fontFamily}`;
    const left = Math.ceil(Math.max(...axis.ticks.map((tick) => pen.measureText(tick.text).width))) + 8;
    this.box = { left, right: width - 6, top: 8, bottom: height - 25 };
    const { right, top, bottom } = this.box;
    this.x = (time) => left + ((time - this.start) / (this.end - this.start)) * (right - left);
    const scale = (bottom - top) / (axis.high - axis.low);
    this.y = (value) => bottom - (Math.min(Math.max(value, axis.low), axis.high) - axis.low) * scale;
    const scenery = svg("g", { class: "axes" });
    for (const { at, text } of axis.ticks) {
      const y = Math.round(this.y(at)) + 0.5;
      scenery.append(svg("line", { x1: left, x2: right, y1: y, y2: y }), label(left - 5, y + 4, "end", text));
    }
    const apart = pen.measureText("00:00:00").width + 2;
    for (const { at, text } of timeAxis(this.start, this.end, ((this.end - this.start) * apart) / (right - left))) {
      const x = Math.round(this.x(at)) + 0.5, half = pen.measureText(text).width / 2;
      scenery.append(svg("line", { x1: x, x2: x, y1: top, y2: bottom + 4 }));
      if (x - half >= 0 && x + half <= width) scenery.append(label(x, height - 6, "middle", text));
    }
    const curves = svg("g", { class: this.panel.kind });
    this.series.forEach((one, number) => {
      const path = this.panel.kind === "stack" ? this.area(number) : this.line(number);
      curves.append(svg("path", { d: path, ...stroke(one.place) }));
    });
    this.cross = svg("line", { class: "cross", y1: top, y2: bottom, visibility: "hidden" });
    this.picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.picture.setAttribute("width", width);
    this.picture.setAttribute("height", height);
    const from = `${this.panel.title} from ${moment(this.start)} to ${moment(this.end)}`;
    this.picture.setAttribute("aria-label", `${from}; arrow keys move along it`);
    this.picture.replaceChildren(scenery, curves, this.cross);
    this.show();
  }

  // The ends are the panel's, if the values keep to them: a little more of a rate is no reason to change the scale.
  axis(pixels) {
    const { low, high, kind, unit } = this.panel;
    const values = this.tops.flat().filter((value) => value !== null);
    if (kind === "stack") values.push(0);
    const least = Math.min(...values), most = Math.max(...values);
    const fixedLow = low !== null && least >= low, fixedHigh = high !== null && most <= high * 1.05;
    const ends = { low: fixedLow ? low : least, high: fixedHigh ? high : most, fixedLow, fixedHigh };
    if (ends.high <= ends.low) {
      ends.high = ends.low + (Math.abs(ends.low) * 0.1 || 1);
      if (!fixedLow) ends.low -= Math.abs(ends.low) * 0.1;
    }
    ends.whole = unit === "" && values.every(Number.isInteger);
    return valueAxis(ends, unit, Math.max(2, Math.floor(pixels / TICK_PX)));
  }

  line(number) {
    return runs(this.tops[number], (value) => value !== null)
      .map(([from, to]) => this.trace(this.tops[number], from, to, "M") + (from === to ? "h0" : ""))
      .join("");
  }

  // Between this series' top and the top of the one below it.
  area(number) {
    const tops = this.tops[number];
    const below = number ? this.tops[number - 1] : tops.map((value) => value && 0);
    return runs(tops, (value) => value !== null)
      .map(([from, to]) => `${this.trace(tops, from, to, "M")}${this.trace(below, to, from, "L")}Z`)
      .join("");
  }

  trace(values, from, to, first) {
    const points = [];
    for (let at = from; from <= to ? at <= to : at >= to; at += from <= to ? 1 : -1) {
      points.push(`${this.x(this.times[at]).toFixed(1)},${this.y(values[at]).toFixed(1)}`);
    }
    return first + points.join("L");
  }

  point(event) {
    const { left, right } = this.box;
    const at = event.clientX - this.picture.getBoundingClientRect().left;
    const time = this.start + ((at - left) / (right - left)) * (this.end - this.start);
    const away = this.times.map((one) => Math.abs(one - time));
    this.index = away.indexOf(Math.min(...away));
    this.show();
  }

  key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") this.leave();
    if (!step) return;
    event.preventDefault();
    this.index = Math.min(Math.max((this.index ?? this.times.length) + step, 0), this.times.length - 1);
    this.show();
  }

  leave() {
    this.index = null;
    if (pointed === this) pointed = null;
    if (this.cross) this.show();
  }

  show() {
    this.said.hidden = this.index === null;
    this.cross.setAttribute("visibility", this.index === null ? "hidden" : "visible");
    if (this.index === null) return;
    if (pointed !== this) pointed?.leave();
    pointed = this;
    const x = this.x(this.times[this.index]);
    this.cross.setAttribute("x1", x);
    this.cross.setAttribute("x2", x);
    const there = this.series.filter((one) => one.points[this.index][1] !== null);
    const { kind, unit } = this.panel;
    const rows = there.slice(0, MOST_SAID).map((one) => {
      const value = element("b", {}, format(one.points[this.index][1], unit));
      return element("li", {}, swatch(one.place, kind), called(one.name), value);
    });
    if (there.length > rows.length) rows.push(element("li", {}, `and ${there.length - rows.length} more`));
    if (!rows.length) rows.push(element("li", {}, "no value"));
    this.said.replaceChildren(element("p", {}, moment(this.times[this.index])), element("ul", {}, ...rows));
    const size = this.said.offsetWidth;
    const beside = x + 12 + size <= this.width ? x + 12 : x - 12 - size;
    this.said.style.left = `${Math.max(0, Math.min(beside, this.width - size))}px`;
  }
}

function label(x, y, anchor, text) {
  return svg("text", { x, y, "text-anchor": anchor }, text);
}

// [first, last] of each stretch of values that are `there`.
function runs(values, there) {
  const found = [];
  values.forEach((value, at) => {
    if (!there(value)) return;
    if (at && there(values[at - 1])) found.at(-1)[1] = at;
    else found.push([at, at]);
  });
  return found;
}

// Each series' value on top of those before it; null where no series has a value.
function stacked(series) {
  const tops = [];
  series.forEach((one, number) => tops.push(one.points.map(([, value], at) => {
    if (series.every((other) => other.points[at][1] === null)) return null;
    return (number ? tops[number - 1][at] : 0) + (value ?? 0);
  })));
  return tops;
}
