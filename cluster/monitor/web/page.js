// The page: what is chosen (kept in the address), what is asked every few seconds, and where it is shown.

import { Alerts } from "./alerts.js";
import { element } from "./chart.js";
import { PanelView } from "./panel.js";
import { clock } from "./units.js";

const EVERY_MS = 5000;
const AT_ONCE = 4; // requests for panels
const SLOWEST_S = 60;
const PATIENCE_MS = 40000;
const RANGES = new Map([
  ["15m", ["15 min", 900]], ["1h", ["1 h", 3600]], ["6h", ["6 h", 6 * 3600]], ["24h", ["24 h", 86400]],
  ["7d", ["7 days", 7 * 86400]], ["30d", ["30 days", 30 * 86400]],
]);

const at = (id) => document.getElementById(id);
const alerts = new Alerts(at("alerts"));
let boards = [];
let views = []; // of the board that is shown
let shown = null; // its key
let turn = new AbortController(); // of the look under way
let waiting = null;
let lastGood = null, failing = null; // when Prometheus answered last, and since when it does not
let runs = [];

// What is chosen: "" stands for all.
function choice() {
  const words = new URLSearchParams(location.hash.slice(1));
  const board = boards.find((one) => one.key === words.get("board")) ?? boards[0];
  const range = RANGES.has(words.get("range")) ? words.get("range") : "1h";
  return { board: board.key, run: words.get("run") ?? "", node: words.get("node") ?? "", range };
}

function address(chosen) {
  const words = Object.entries(chosen).filter(([, value]) => value !== "");
  return `#${new URLSearchParams(words)}`;
}

// Raises Error with a line of text. `look`: the signal that this look is over.
async function ask(path, words, look) {
  const signal = AbortSignal.any([look, AbortSignal.timeout(PATIENCE_MS)]);
  const query = new URLSearchParams(words).toString();
  let answer;
  try {
    answer = await fetch(`api/${path}${query && "?"}${query}`, { signal });
  } catch (error) {
    if (look.aborted) throw error;
    throw new Error("The monitor does not answer; `fathom monitor status` says whether it is up", { cause: error });
  }
  if (!answer.ok) throw new Error((await answer.text()).trim());
  return answer.json();
}

function fill(select, options) {
  const wanted = JSON.stringify(options);
  if (select.dataset.options === wanted) return; // else an open list would close
  select.dataset.options = wanted;
  select.replaceChildren(...options.map(([value, text]) => element("option", { value }, text)));
}

function offer(chosen, values) {
  for (const [name, known] of [["run", values.runs], ["node", values.nodes]]) {
    const options = [["", `all ${name}s`], ...known.map((one) => [one, one])];
    const own = chosen[name];
    if (own && !known.includes(own)) options.push([own, `${own} (not in this time)`]);
    fill(at(name), options);
    at(name).value = own;
  }
}

function build(chosen) {
  at("tabs").replaceChildren(...boards.map((board) => {
    const current = board.key === chosen.board ? { "aria-current": "page" } : {};
    return element("a", { href: address({ ...chosen, board: board.key }), ...current }, tabName(board));
  }));
  at("range").value = chosen.range;
  if (shown === chosen.board) return;
  shown = chosen.board;
  views.forEach((view) => view.close());
  const board = boards.find((one) => one.key === shown);
  document.title = board.title;
  views = [];
  at("board").replaceChildren(...board.rows.map((row) => {
    const own = row.panels.map((panel) => new PanelView(panel));
    views.push(...own);
    const kinds = row.panels.every((panel) => panel.kind === "stat") ? "stats" : "charts";
    const grid = element("div", { class: `row ${kinds} of-${own.length}` }, ...own.map((view) => view.host));
    return element("section", {}, element("h2", {}, row.question), grid);
  }));
}

function tabName(board) {
  const name = board.title.replace(/^fathom: /, "");
  return name[0].toUpperCase() + name.slice(1);
}

// One look: everything that is due, then again in five seconds. `anew`: something else was chosen.
async function look(anew) {
  turn.abort();
  turn = new AbortController();
  clearTimeout(waiting);
  const { signal } = turn;
  try {
    if (!boards.length) await begin(signal);
    await show(choice(), anew, signal);
    lastGood = new Date();
    failing = null;
  } catch (error) {
    if (signal.aborted) return;
    failing ??= new Date();
    say(error.message);
  }
  if (!failing) say("");
  if (!document.hidden) waiting = setTimeout(() => look(false), EVERY_MS);
}

async function begin(signal) {
  boards = await ask("boards", {}, signal);
  fill(at("range"), [...RANGES].map(([key, [text]]) => [key, text]));
}

async function show(chosen, anew, signal) {
  build(chosen);
  const seconds = RANGES.get(chosen.range)[1];
  const here = Date.now() / 1000;
  const span = { start: (here - seconds).toFixed(3), end: here.toFixed(3) };
  const values = await ask("values", { board: chosen.board, ...span }, signal);
  runs = values.runs;
  offer(chosen, values);
  const range = { start: (values.now - seconds).toFixed(3), end: values.now.toFixed(3) }; // by the monitor's clock
  const words = { board: chosen.board, ...range };
  for (const name of ["run", "node"]) if (chosen[name]) words[name] = chosen[name];
  // A pixel of a long range is minutes: such a chart need not be new every five seconds.
  const patience = Math.min(seconds / 300 / 4, SLOWEST_S) * 1000;
  const due = views.filter((view) => view.due(anew, patience));
  const more = Array.from({ length: AT_ONCE }, () => work(due, words, chosen, signal));
  await Promise.all([ask("alerts", {}, signal).then((found) => alerts.show(found)), ...more]);
}

async function work(due, words, chosen, signal) {
  for (let view = due.shift(); view; view = due.shift()) {
    const answer = await ask("panel", { ...words, panel: view.panel.key }, signal).catch((error) => error);
    if (signal.aborted) return;
    if (answer instanceof Error) view.fail(answer.message);
    else view.show(answer, runs, chosen.run !== "");
  }
}

function say(trouble) {
  const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;
  const kept = lastGood ? ` What is shown is from ${clock(lastGood)}.` : "";
  const good = () => `as of ${clock(lastGood)}; times are those of ${zone}`;
  const line = trouble ? `${trouble} (since ${clock(failing)}).${kept}` : good();
  at("status").classList.toggle("trouble", trouble !== "");
  document.body.classList.toggle("stale", trouble !== "");
  if (at("status").textContent !== line) at("status").textContent = line;
}

at("choice").addEventListener("submit", (event) => event.preventDefault());
at("choice").addEventListener("change", () => {
  const chosen = { board: choice().board };
  for (const name of ["run", "node", "range"]) chosen[name] = at(name).value;
  location.hash = address(chosen);
});
addEventListener("hashchange", () => look(true));
document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(waiting) : look(false)));
look(true);
