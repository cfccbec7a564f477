// Numbers and times as text, and the ticks of axes.

const SPACE = "\u00a0"; // between a number and its unit: they stay on one line
const SECONDS = [[1e-6, "µs"], [1e-3, "ms"], [1, "s"], [60, "min"], [3600, "h"], [86400, "d"]];
const BYTES = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"].map((name, power) => [1024 ** power, name]);
const COUNTS = [[1, ""], [1e6, "M"], [1e9, "G"]];
const MINUTE = 60, HOUR = 3600, DAY = 86400;
const TIME_STEPS = [
  1, 2, 5, 10, 15, 30, MINUTE, 2 * MINUTE, 5 * MINUTE, 10 * MINUTE, 15 * MINUTE, 30 * MINUTE, HOUR, 2 * HOUR, 3 * HOUR,
  6 * HOUR, 12 * HOUR, DAY, 2 * DAY, 5 * DAY, 7 * DAY, 14 * DAY, 28 * DAY,
];

// [factor, name] of the largest unit that makes `largest` at least 1 (2 of minutes and up: "90 s" reads better).
function scaleOf(unit, largest) {
  if (unit === "ratio") return [0.01, "%"];
  if (largest > 0 && largest < 1e-3 && unit === "") {
    const power = Math.floor(Math.log10(largest) + 1e-9);
    return [10 ** power, `e${power}`];
  }
  const table = unit === "seconds" ? SECONDS : unit.startsWith("bytes") ? BYTES : COUNTS;
  let found = table[0];
  for (const [factor, name] of table) {
    if (largest >= factor * (table === SECONDS && factor >= MINUTE ? 2 : 1)) found = [factor, name];
  }
  return table === BYTES ? [found[0], found[1] + unit.slice("bytes".length)] : found;
}

function withUnit(text, name) {
  return name.startsWith("e") ? text + name : name ? text + SPACE + name : text;
}

function digits(value, decimals) {
  return value.toLocaleString("en", { maximumFractionDigits: decimals, minimumFractionDigits: decimals });
}

// Three digits that count, more of a whole number.
function short(value) {
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return digits(value, 0);
  const size = value === 0 ? 0 : Math.floor(Math.log10(Math.abs(value)));
  return value.toLocaleString("en", { maximumFractionDigits: Math.max(0, 2 - size) });
}

// "2 h 13 min": of long times the two largest units.
function duration(seconds) {
  const sign = seconds < 0 ? "-" : "";
  const size = Math.abs(seconds);
  const [large, name, small, below] =
    size >= DAY ? [DAY, "d", HOUR, "h"] : size >= HOUR ? [HOUR, "h", MINUTE, "min"] : [MINUTE, "min", 1, "s"];
  const parts = Math.round(size / small);
  const whole = Math.floor((parts * small) / large);
  const rest = parts - (whole * large) / small;
  return `${sign}${digits(whole, 0)}${SPACE}${name}` + (rest ? ` ${rest}${SPACE}${below}` : "");
}

/** A value with its unit, as it stands in a legend. */
export function format(value, unit) {
  if (value === null || value === undefined) return "–";
  if (unit === "seconds" && value === 0) return withUnit("0", "s");
  if (unit === "seconds" && Math.abs(value) >= 2 * MINUTE) return duration(value);
  const [factor, name] = scaleOf(unit, Math.abs(value));
  const text = withUnit(short(value / factor), name);
  if (unit === "images/s") return withUnit(text, unit);
  return unit === "1/s" ? `${text}${name ? "" : SPACE}/s` : text;
}

function niceStep(rough) {
  const power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 5, 10].find((step) => step * power >= rough * (1 - 1e-9));
}

/** The y axis: its ends and at most about `most` ticks. An end that is not `fixed` moves out to a tick. */
export function valueAxis(ends, unit, most, largest = Math.max(Math.abs(ends.low), Math.abs(ends.high))) {
  const { low, high, fixedLow, fixedHigh, whole } = ends;
  const [factor, name] = scaleOf(unit, largest);
  const step = Math.max(niceStep((high - low) / factor / most), whole && factor === 1 ? 1 : 0);
  const from = fixedLow ? Math.ceil(low / factor / step - 1e-6) : Math.floor(low / factor / step + 1e-6);
  const to = fixedHigh ? Math.floor(high / factor / step + 1e-6) : Math.ceil(high / factor / step - 1e-6);
  const top = to * step * factor;
  if (top > largest && scaleOf(unit, top)[1] !== name) return valueAxis(ends, unit, most, top); // 1 s, not 1,000 ms
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const ticks = [];
  for (let number = from; number <= to; number++) {
    const text = number === 0 ? "0" : digits(number * step, decimals);
    ticks.push({ at: number * step * factor, text: number === 0 && name !== "%" ? text : withUnit(text, name) });
  }
  return {
    low: fixedLow ? low : from * step * factor,
    high: fixedHigh ? high : Math.max(to, from + 1) * step * factor,
    ticks,
  };
}

/** The time axis: ticks at round local times, at least `apart` seconds from one another. */
export function timeAxis(start, end, apart) {
  const step = TIME_STEPS.find((one) => one >= apart) ?? Math.ceil(apart / DAY) * DAY;
  const first = new Date(start * 1000);
  const since = first.getHours() * HOUR + first.getMinutes() * MINUTE + first.getSeconds(); // midnight
  const ticks = [];
  for (let number = 0; number < 1000; number++) {
    // counted from midnight, as the clock shows it: right also where the clocks change
    const [days, seconds] = step >= DAY ? [number, 0] : [0, (Math.floor(since / step) + number) * step];
    const at = new Date(first.getFullYear(), first.getMonth(), first.getDate() + days, 0, 0, seconds);
    if (at / 1000 > end) break;
    const day = Date.UTC(at.getFullYear(), at.getMonth(), at.getDate()) / 1000;
    if (at / 1000 < start || (step >= DAY && day % step)) continue;
    if (ticks.length && at / 1000 - ticks.at(-1).at < apart * 0.9) continue; // an hour that does not exist
    ticks.push({ at: at / 1000, text: tickText(at, step) });
  }
  return ticks;
}

function tickText(at, step) {
  if (step >= DAY || (at.getHours() === 0 && at.getMinutes() === 0 && at.getSeconds() === 0)) return dayText(at);
  return clock(at, step < MINUTE);
}

function dayText(at) {
  return at.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
}

/** "14:05" or "14:05:09". */
export function clock(at, seconds = true) {
  return at.toLocaleTimeString("en-GB", { timeStyle: seconds ? "medium" : "short" });
}

/** A time of a crosshair; with the day, where it is not today's. */
export function moment(seconds) {
  const at = new Date(seconds * 1000);
  const today = at.toDateString() === new Date().toDateString();
  return today ? clock(at) : `${dayText(at)} ${clock(at)}`;
}
