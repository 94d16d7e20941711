// The pages of a worker work without this script.  It asks for a live page again every second while its tab is seen and puts what
// has changed in place, draws the charts, and searches while one types.  No text from outside goes in as HTML that runs: pages
// are made, and escaped, by the worker.
"use strict";

const ANSWER_MS = 4000, SILENT_AFTER = 2, KEEP_S = 300, TYPED_MS = 200;
const $ = (id) => document.getElementById(id);
const every = Number(document.body.dataset.every) || 0;

// Live: what has changed

/** Make an element, and what it holds, like another one; what says data-keep stays as it is. */
function morph(old, now) {
  if (old.nodeType !== now.nodeType || old.nodeName !== now.nodeName || old.id !== now.id) return old.replaceWith(document.adoptNode(now));
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.data !== now.data) old.data = now.data;
    return;
  }
  if (old.dataset.keep !== undefined) return;
  for (const { name } of [...old.attributes]) if (!now.hasAttribute(name) && name !== "open") old.removeAttribute(name);
  for (const { name, value } of now.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  const before = [...old.childNodes], after = [...now.childNodes];
  after.forEach((node, n) => { if (n < before.length) morph(before[n], node); else old.append(document.adoptNode(node)); });
  before.slice(after.length).forEach((node) => node.remove());
}

let timer = 0, failures = 0, heard = "", turn = 0;

function alarm(text) {
  const box = $("alarm");
  box.hidden = !text;
  if (box.textContent !== text) box.textContent = text;
  document.documentElement.classList.toggle("stale", Boolean(text));
}

async function refresh() {
  clearTimeout(timer);
  const mine = ++turn;
  try {
    const answer = await fetch(location.href, { signal: AbortSignal.timeout(ANSWER_MS), headers: { Accept: "text/html" } });
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (mine !== turn) return;  // another one was asked for meanwhile
    failures = 0;
    if (answer.headers.get("Content-Type")?.startsWith("text/html") && page.getElementById("main")) {
      heard = new Date().toISOString().slice(11, 19);
      if (answer.ok || !$("plot-rate")) for (const part of [".status", "main", "footer"]) morph(document.querySelector(part), page.querySelector(part));
      document.title = page.title;
      alarm(answer.ok ? "" : page.getElementById("main").textContent);
    }
    charts();
  } catch (error) {
    failures += 1;
    if (failures >= SILENT_AFTER) {
      alarm(`No answer from this worker. ${heard ? `What you see is as of ${heard}. ` : ""}Asking again every second.`);
      $("state").dataset.state = "failed";
      $("state").textContent = "no answer";
    }
    if (!(error instanceof TypeError || error instanceof DOMException)) throw error;
  } finally {
    if (mine === turn && every && !document.hidden) timer = setTimeout(refresh, every);
  }
}

document.addEventListener("visibilitychange", () => { if (document.hidden) clearTimeout(timer); else if (every) refresh(); });
if (every) timer = setTimeout(refresh, every);

// Search: the policy lets no form be sent, so the script goes where it points

for (const form of document.querySelectorAll("form")) {
  form.hidden = false;
  const target = () => {
    const url = new URL(form.dataset.live === undefined ? form.getAttribute("action") : location.href, location.href);
    const text = form.elements.q.value.trim();
    if (form.dataset.live !== undefined) url.searchParams.delete("page");
    if (text) url.searchParams.set("q", text); else url.searchParams.delete("q");
    return url;
  };
  let typed = 0;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(typed);
    if (form.dataset.live === undefined) location.assign(target());
    else { history.replaceState(null, "", target()); refresh(); }
  });
  if (form.dataset.live !== undefined) form.addEventListener("input", () => {
    clearTimeout(typed);
    typed = setTimeout(() => { history.replaceState(null, "", target()); refresh(); }, TYPED_MS);
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select")) return;
  event.preventDefault();
  ($("search") ?? $("find-q"))?.focus();
});

// Charts

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const one = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const count = (n) => (n == null ? "\u2013" : whole.format(n));
const rate = (n) => (n == null ? "\u2013" : n >= 100 || n === 0 ? whole.format(n) : one.format(n));
const span = (s) => (s == null ? "\u2013" : s < 1 ? `${Math.max(1, Math.round(s * 1000))} ms` : s < 100 ? `${s.toFixed(1)} s` : `${Math.round(s)} s`);
const short = (n) => (n >= 10000 ? `${one.format(n / 1000)}k` : n >= 1 || n === 0 ? count(n) : one.format(n));
const tick = (s) => (s === 0 ? "0" : s < 1 ? `${whole.format(s * 1000)} ms` : `${one.format(s)} s`);

const CHARTS = [
  { id: "rate", empty: "No orders in these minutes", format: rate, tick: short, floor: 10, series: [
    { column: "created", label: "taken in", colour: "blue" },
    { column: "confirmed", label: "confirmed", colour: "green" },
    { column: "cancelled", label: "cancelled", colour: "amber", key: "dash", dash: [5, 4] } ] },
  { id: "time", empty: "No order has ended in these minutes", format: span, tick, floor: 0.05, series: [
    { column: "p50", label: "p50", colour: "blue" },
    { column: "p95", label: "p95", colour: "violet", key: "dash", dash: [5, 4] },
    { column: "p99", label: "p99", colour: "red", key: "dots", dash: [2, 3] } ] },
  { id: "lag", empty: "", format: count, tick: short, floor: 10, series: [{ column: "lag", label: "not committed", colour: "violet", area: true }] },
];
const store = { columns: [], rows: [] };

function colour(name) {
  const probe = document.body.appendChild(document.createElement("i"));
  probe.className = `ink-${name}`;
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}
const clock = (at) => new Date(at * 1000).toISOString().slice(11, at % 60 ? 19 : 16);
const at = (column) => store.columns.indexOf(column);
const table = (chart) => [store.rows.map((row) => row[0]), ...chart.series.map((s) => store.rows.map((row) => row[at(s.column)]))];

function draw(chart) {
  const box = $(`plot-${chart.id}`), line = colour("grid"), text = colour("dim"), font = "11px system-ui, sans-serif";
  chart.plot?.destroy();
  box.replaceChildren();
  sizes.observe(box);
  chart.plot = new uPlot({
    width: box.clientWidth, height: box.clientHeight, padding: [8, 6, 0, 0],
    legend: { show: false }, cursor: { y: false, drag: { x: false, y: false }, points: { size: 6 } },
    scales: { x: { range: (u, min, max) => [max - KEEP_S, max] }, y: { range: (u, min, max) => [0, Math.max(chart.floor, (max || 0) * 1.1)] } },
    axes: [
      { stroke: text, font, grid: { show: false }, ticks: { stroke: line, size: 4 }, size: 26, space: 64, values: (u, v) => v.map(clock) },
      { stroke: text, font, grid: { stroke: line, width: 1 }, ticks: { show: false }, size: 44, space: 34, gap: 4, values: (u, v) => v.map(chart.tick) },
    ],
    series: [{}, ...chart.series.map((s) => ({ stroke: colour(s.colour), width: 1.75, dash: s.dash, spanGaps: false, points: { show: false },
      fill: s.area ? colour(s.colour).replace("rgb(", "rgba(").replace(")", ", .12)") : undefined }))],
    hooks: { setCursor: [(u) => legend(chart, u.cursor.idx)] },
  }, table(chart), box);
}

function legend(chart, idx) {
  const row = store.rows[idx ?? store.rows.length - 1];
  $(`legend-${chart.id}`).replaceChildren(...chart.series.map((s) => {
    const [item, key, value] = ["li", "span", "b"].map((name) => document.createElement(name));
    key.className = `key ${s.key || ""} ink-${s.colour}`;
    value.textContent = chart.format(row?.[at(s.column)]);
    item.append(key, s.label, value);
    return item;
  }));
}

function redraw() {
  for (const chart of CHARTS) {
    const box = $(`plot-${chart.id}`), data = table(chart), last = store.rows.at(-1);
    box.classList.toggle("empty", Boolean(chart.empty) && !data.slice(1).some((values) => values.some(Boolean)));
    box.dataset.empty = chart.empty;
    if (!chart.plot) draw(chart); else chart.plot.setData(data);
    if (chart.plot.cursor.idx == null) legend(chart, null);
    const said = last ? chart.series.map((s) => `${s.label} ${chart.format(last[at(s.column)])}`).join(", ") : "no figures yet";
    box.removeAttribute("aria-labelledby");
    box.setAttribute("aria-label", `${$(`h-${chart.id}`).textContent}, a chart of the last five minutes. Now: ${said}.`);
  }
}

let asking = false;
async function charts() {
  if (!$("plot-rate") || asking || document.hidden) return;
  asking = true;
  try {
    const answer = await fetch(`/stats/pipeline?since=${store.rows.at(-1)?.[0] ?? 0}`, { signal: AbortSignal.timeout(ANSWER_MS) });
    if (!answer.ok) return;
    const { history } = await answer.json();
    store.columns = history.columns;
    store.rows.push(...history.rows);
    while (store.rows.length && store.rows[0][0] < store.rows.at(-1)[0] - KEEP_S) store.rows.shift();
    redraw();
  } catch (error) {
    if (!(error instanceof TypeError || error instanceof DOMException)) throw error;  // the page says that nobody answers
  } finally {
    asking = false;
  }
}

const sizes = new ResizeObserver(() => {
  for (const { id, plot } of CHARTS) { const box = $(`plot-${id}`); if (plot && box.clientWidth) plot.setSize({ width: box.clientWidth, height: box.clientHeight }); }
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (store.rows.length) { CHARTS.forEach(draw); redraw(); } });
charts();
