// The stats page of a worker.  It reads /stats/summary once a second while the tab is seen, and draws what it says.
// All text from outside goes in as text, never as HTML.
"use strict";

const EVERY_MS = 1000, GROUP_EVERY_MS = 3000, ANSWER_MS = 4000, KEEP_S = 300, SILENT_AFTER = 2;
const $ = (id) => document.getElementById(id);
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const one = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

const count = (n) => (n == null ? "–" : whole.format(n));
const rate = (n) => (n == null ? "–" : n >= 100 || n === 0 ? whole.format(n) : one.format(n));
const share = (n) => (n > 0 && n < 0.001 ? "<0.1 %" : `${one.format(100 * n)} %`);
const span = (s) => (s == null ? "–" : s < 1 ? `${Math.max(1, Math.round(s * 1000))} ms` : s < 100 ? `${s.toFixed(1)} s` : `${Math.round(s)} s`);
const clock = (at) => new Date(at * 1000).toLocaleTimeString("en-GB");
const word = (reason) => (reason || "unknown").replaceAll("_", " ");
const age = (s) => (s < 90 ? `${Math.round(s)} s` : s < 5400 ? `${Math.round(s / 60)} min` : s < 172800 ? `${Math.round(s / 3600)} h` : `${Math.round(s / 86400)} d`);

/** Make an element: its class, its text or children. */
function el(tag, cls, ...inside) {
  const made = document.createElement(tag);
  if (cls) made.className = cls;
  made.append(...inside.map((x) => (x instanceof Node ? x : String(x))));
  return made;
}
const head = (scope, cls, text) => { const th = el("th", cls, text); th.scope = scope; return th; };
const row = (...cells) => el("tr", "", ...cells);
const fill = (target, ...rows) => target.replaceChildren(...rows);
const none = (columns, text) => { const td = el("td", "none", text); td.colSpan = columns; return row(td); };

// Charts

const colour = (name) => {
  const probe = $("state"), before = probe.style.color;
  probe.style.color = `var(--${name})`;
  const found = getComputedStyle(probe).color;
  probe.style.color = before;
  return found;
};
const store = { columns: [], rows: [] };
const charts = [
  { id: "rate", empty: "No orders yet", format: rate, floor: 10, series: [
    { column: "created", label: "taken in", colour: "blue" },
    { column: "confirmed", label: "confirmed", colour: "green", dash: [] },
    { column: "cancelled", label: "cancelled", colour: "amber", dash: [5, 4], key: "dash" } ] },
  { id: "time", empty: "No order has ended in these minutes", format: span, floor: 0.05, series: [
    { column: "p50", label: "p50", colour: "blue" },
    { column: "p95", label: "p95", colour: "violet", dash: [5, 4], key: "dash" },
    { column: "p99", label: "p99", colour: "red", dash: [2, 3], key: "dots" } ] },
  { id: "lag", empty: "", format: count, floor: 10, series: [{ column: "lag", label: "not committed", colour: "violet", area: true }] },
];

function axis(values) {
  return values.map((at) => { const d = new Date(at * 1000); return `${d.getHours()}:${String(d.getMinutes()).padStart(2, "0")}${d.getSeconds() ? ":" + String(d.getSeconds()).padStart(2, "0") : ""}`; });
}
const short = (n) => (n >= 10000 ? `${one.format(n / 1000)}k` : n >= 1 || n === 0 ? count(n) : one.format(n));
const tick = (s) => (s === 0 ? "0" : s < 1 ? `${whole.format(s * 1000)} ms` : `${one.format(s)} s`);

function draw(chart) {
  const box = $(`plot-${chart.id}`), line = colour("grid"), text = colour("dim");
  chart.plot?.destroy();
  const font = "11px system-ui, sans-serif";
  chart.plot = new uPlot({
    width: box.clientWidth, height: box.clientHeight, padding: [8, 6, 0, 0],
    legend: { show: false }, cursor: { y: false, drag: { x: false, y: false }, points: { size: 6 } },
    scales: { x: { range: (u, min, max) => [max - KEEP_S, max] }, y: { range: (u, min, max) => [0, Math.max(chart.floor, (max || 0) * 1.1)] } },
    axes: [
      { stroke: text, font, grid: { show: false }, ticks: { stroke: line, size: 4 }, size: 26, space: 64, values: (u, v) => axis(v) },
      { stroke: text, font, grid: { stroke: line, width: 1 }, ticks: { show: false }, size: 44, space: 34, gap: 4,
        values: (u, v) => v.map((n) => (chart.format === span ? tick(n) : short(n))) },
    ],
    series: [{}, ...chart.series.map((s) => ({ stroke: colour(s.colour), width: 1.75, dash: s.dash, spanGaps: false, points: { show: false },
      fill: s.area ? colour(s.colour).replace("rgb(", "rgba(").replace(")", ", .12)") : undefined }))],
    hooks: { setCursor: [(u) => legend(chart, u.cursor.idx)] },
  }, table(chart), box);
}

function table(chart) {
  const at = store.columns.indexOf("at");
  return [store.rows.map((r) => r[at]), ...chart.series.map((s) => { const n = store.columns.indexOf(s.column); return store.rows.map((r) => r[n]); })];
}

function legend(chart, idx) {
  const rows = store.rows, shown = idx ?? rows.length - 1;
  fill($(`legend-${chart.id}`), ...chart.series.map((s) => {
    const key = el("span", `key ${s.key || ""}`);
    key.style.borderTopColor = `var(--${s.colour})`;
    const value = rows[shown]?.[store.columns.indexOf(s.column)];
    return el("li", "", key, s.label, el("b", "", chart.format(value)));
  }));
}

function redraw() {
  for (const chart of charts) {
    const box = $(`plot-${chart.id}`), data = table(chart);
    const empty = chart.empty && !data.slice(1).some((values) => values.some((v) => v));
    box.classList.toggle("empty", Boolean(empty));
    box.dataset.empty = chart.empty;
    if (!chart.plot) draw(chart); else chart.plot.setData(data);
    if (chart.plot.cursor.idx == null) legend(chart, null);
    const last = store.rows.at(-1);
    const values = last ? chart.series.map((s) => `${s.label} ${chart.format(last[store.columns.indexOf(s.column)])}`).join(", ") : "no figures yet";
    box.setAttribute("aria-label", `Chart of the last five minutes. Now: ${values}.`);
  }
}

// The page

function tile(name, value, unit, below, flow) {
  const big = el("dd", "v", value);
  if (unit) big.append(el("i", "", unit));
  return el("div", flow ? "flow" : "", el("dt", "", name), big, el("dd", "t", below));
}

function steps(summary) {
  const { orders, rates, time_to_end: time, open } = summary;
  const cancelled = sum(orders.cancelled), opened = sum(open), letters = sum(summary.dead_letters);
  const of = (name) => `${count(orders[name])} in all`;
  fill($("steps"),
    tile("Taken in", rate(rates.created), "/s", of("created"), true),
    tile("Reserved", rate(rates.reserved), "/s", of("reserved"), true),
    tile("Paid", rate(rates.paid), "/s", of("paid"), true),
    tile("Confirmed", rate(rates.confirmed), "/s", of("confirmed")),
    tile("Cancelled", rate(rates.cancelled), "/s", `${count(cancelled)} in all`),
    tile("To the end, p50", ...split(time.p50), time.sampled ? `p95 ${span(time.p95)} · p99 ${span(time.p99)}` : "none ended in 60 s"),
    tile("Lag", count(summary.lag), "records", `${count(summary.owned)} partitions`),
    tile("Open orders", count(opened), "", letters ? `${count(letters)} dead letters` : "no dead letters"));
}
const sum = (by) => Object.values(by).reduce((a, b) => a + b, 0);
const split = (s) => { const [n, unit] = span(s).split(" "); return [n, unit || ""]; };

function verdicts({ confirmed, cancelled }) {
  const ended = [["confirmed", confirmed], ...Object.entries(cancelled).map(([r, n]) => [word(r), n]).sort((a, b) => b[1] - a[1])];
  const all = sum(Object.fromEntries(ended));
  fill($("verdicts").tBodies[0], ...(all ? ended.map(([name, n]) => row(head("row", "", name), el("td", "n", count(n)), el("td", "n dim", share(n / all)))) : [none(3, "No order has ended here yet.")]));
}

function openOrders(summary) {
  const rows = Object.entries(summary.open).map(([status, n]) => row(head("row", "", word(status).toLowerCase()), el("td", "n", count(n))));
  rows.push(row(head("row", "", "charges under way"), el("td", summary.charges_in_flight ? "n" : "n zero", count(summary.charges_in_flight))));
  if (summary.sent_on) rows.push(row(head("row", "", "records sent on to their owner"), el("td", "n", count(summary.sent_on))));
  if (!Object.keys(summary.open).length) rows.unshift(row(head("row", "", "open orders"), el("td", "n zero", "0")));
  fill($("open").tBodies[0], ...rows);
}

function stages(by) {
  fill($("stages").tBodies[0], ...Object.entries(by).map(([name, s]) => row(head("row", "", name.replace("order-", "")),
    el("td", s.records_per_s ? "n" : "n zero", rate(s.records_per_s)),
    el("td", s.batches ? "n" : "n zero", s.batches ? rate(s.records / s.batches) : "–"),
    el("td", s.busy > 0.9 ? "n warn" : s.busy ? "n" : "n zero", s.busy == null ? "–" : `${Math.round(100 * s.busy)} %`))));
}

function letters(by) {
  const rows = Object.entries(by).sort((a, b) => b[1] - a[1]);
  fill($("letters").tBodies[0], ...(rows.length ? rows.map(([r, n]) => row(head("row", "", word(r)), el("td", "n bad", count(n)))) : [none(2, "None.")]));
}

const SVG = "http://www.w3.org/2000/svg";
function meter(left, held, sold) {
  const svg = document.createElementNS(SVG, "svg"), all = left + held + sold || 1;
  svg.setAttribute("class", "meter");
  svg.setAttribute("aria-hidden", "true");
  for (const [cls, from, to] of [["all", 0, 1], ["left", 0, left / all], ["held", left / all, (left + held) / all]]) {
    const bar = document.createElementNS(SVG, "rect");
    for (const [name, value] of [["class", cls], ["x", `${100 * from}%`], ["width", `${100 * (to - from)}%`], ["height", "8"], ["rx", cls === "all" ? "2" : "0"]]) bar.setAttribute(name, value);
    svg.append(bar);
  }
  return svg;
}

function stock({ busiest, products, sold_out: soldOut }) {
  $("stock-sum").textContent = products ? `${count(products)} products that moved, ${count(soldOut)} sold out${products > busiest.length ? `; the ${busiest.length} busiest` : ""}` : "";
  fill($("stock").tBodies[0], ...(busiest.length ? busiest.map((p) => {
    const id = head("row", "id", p.product_id);
    const left = p.available ? count(p.available) : el("span", "tag", "sold out");
    return row(id, el("td", "n", left), el("td", p.reserved ? "n" : "n zero", count(p.reserved)), el("td", "n", count(p.sold)), el("td", "bar", meter(p.available, p.reserved, p.sold)));
  }) : [none(5, "No product of this worker has moved yet. Any product can be looked up below.")]));
}

let group = null;
function partitions({ worker, partitions: own }) {
  const rows = new Map();
  for (const p of [...(group?.partitions ?? []), ...own]) {
    const at = rows.get(p.partition) ?? rows.set(p.partition, { owners: new Map(), lag: new Map() }).get(p.partition);
    at.lag.set(p.topic, p.lag);
    at.owners.set(p.topic, p.owner);
  }
  const topics = [...new Set([...(group?.partitions ?? []), ...own].map((p) => p.topic))];
  fill($("partitions").tHead, row(head("col", "", "no."), head("col", "", "owner"), ...topics.map((t) => head("col", "n", t))));
  const here = new URL(worker).hostname;
  const place = (url) => { try { const at = new URL(url); return at.hostname === here ? `:${at.port}` : at.host; } catch { return url; } };
  fill($("partitions").tBodies[0], ...(rows.size ? [...rows].sort((a, b) => a[0] - b[0]).map(([n, at]) => {
    const owners = [...new Set(at.owners.values())];
    const owner = owners.length === 1 && owners[0] === worker ? el("span", "self", "this one") : owners.map((o) => (o ? place(o) : "no worker")).join(", ");
    return row(head("row", "", n), el("td", "owner", owner), ...topics.map((t) => { const lag = at.lag.get(t); return el("td", lag ? "n" : "n zero", count(lag)); }));
  }) : [none(8, "This worker owns no partition: it is joining, or there are more workers than partitions.")]));
  const others = group?.workers?.filter((w) => !w.self) ?? [];
  fill($("workers"), ...others.map((w) => {
    const link = el("a", "", place(w.url));
    link.href = /^http:\/\//.test(w.url) ? `${w.url.replace(/\/$/, "")}/stats/` : "#";
    return el("li", "", el("span", `dot ${w.answers ? "ok" : "bad"}`), link, w.answers ? `${w.partitions} partitions` : el("span", "bad-text", "does not answer"));
  }));
}

const NAMES = { kafka: "Kafka", redis: "Redis", postgres: "Postgres" };
function engines(by, unavailable) {
  fill($("engines"), ...Object.entries(NAMES).map(([key, name]) => {
    const found = by[key], bad = (found && !found.ready) || unavailable.includes(key);
    const li = el("li", "", el("span", `dot ${bad ? "bad" : found ? "ok" : ""}`), name, bad ? el("span", "bad-text", "unavailable") : el("span", "dim", found ? `${one.format(found.latency_ms)} ms` : "not asked yet"));
    if (found) li.title = found.error ? `${found.address}: ${found.error}` : `${found.address}, asked at ${clock(found.at)}`;
    return li;
  }));
}

function state(name, text) {
  const pill = $("state");
  pill.dataset.state = name;
  if (pill.textContent !== text) pill.textContent = text;
}
function alarm(text) {
  const box = $("alarm");
  box.hidden = !text;
  if (box.textContent !== (text || "")) box.textContent = text || "";
  document.documentElement.classList.toggle("stale", Boolean(text));
}

function show(summary) {
  const host = (() => { try { return new URL(summary.worker).host; } catch { return summary.worker; } })();
  document.title = `${rate(summary.rates.created)}/s · orderstream ${host}`;
  $("worker").textContent = host;
  $("about").textContent = `v${summary.version}, up ${age(summary.now - summary.started_at)}`;
  state(summary.state, summary.state);
  if (summary.history) {
    store.columns = summary.history.columns;
    store.rows.push(...summary.history.rows);
    const oldest = (store.rows.at(-1)?.[0] ?? 0) - KEEP_S;
    while (store.rows.length && store.rows[0][0] < oldest) store.rows.shift();
  }
  engines(summary.engines, summary.unavailable);
  steps(summary);
  verdicts(summary.orders);
  openOrders(summary);
  stages(summary.stages);
  letters(summary.dead_letters);
  stock(summary.stock);
  partitions(summary);
  redraw();
}

// Polling

let timer = 0, failures = 0, heard = 0, born = 0, asking = false, groupAt = 0;

async function read(path) {
  const answer = await fetch(path, { signal: AbortSignal.timeout(ANSWER_MS), headers: { Accept: "application/json" } });
  return { status: answer.status, body: await answer.json() };
}

async function poll() {
  clearTimeout(timer);
  if (document.hidden || asking) return;
  asking = true;
  try {
    const since = store.rows.at(-1)?.[0] ?? 0;
    if (performance.now() - groupAt > GROUP_EVERY_MS || !group) {
      groupAt = performance.now();
      read("/stats/partitions").then(({ status, body }) => { if (status === 200) group = body; }, () => { groupAt = 0; });
    }
    const { status, body } = await read(`/stats/summary?since=${since}`);
    failures = 0;
    if (status === 200) {
      if (born && body.started_at !== born) store.rows.length = 0;  // another process answers here now
      born = body.started_at;
      heard = body.now;
      alarm("");
      show(body);
    } else if (status === 503) {
      state("starting", "starting");
      alarm(heard ? "This worker is starting again. Figures follow in a moment." : "");
    } else {
      state("failed", `error ${status}`);
      alarm(`The worker answers with an error: ${body.title ?? status}. ${body.detail ?? ""}`);
    }
  } catch (error) {
    failures += 1;
    if (failures >= SILENT_AFTER) {
      state("failed", "no answer");
      alarm(heard ? `No answer from this worker. What you see is as of ${clock(heard)}. Asking again every second.` : "No answer from this worker. Asking again every second.");
    }
    if (!(error instanceof TypeError || error instanceof DOMException)) throw error;
  } finally {
    asking = false;
    if (!document.hidden) timer = setTimeout(poll, EVERY_MS);
  }
}

document.addEventListener("visibilitychange", () => { if (document.hidden) clearTimeout(timer); else poll(); });

// Look up

const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/i;

async function lookUp(id) {
  const kind = UUID.test(id) ? "orders" : "products";
  const { status, body: found } = await read(`/stats/${kind}/${encodeURIComponent(id)}`);
  if (status !== 200) return el("p", "bad-text", `${found.title ?? status}. ${found.detail ?? ""}`);
  const skip = new Set(["lines", "version", "source"]);
  const rows = Object.entries(found).filter(([k, v]) => !skip.has(k) && v != null);
  for (const line of found.lines ?? []) rows.push([`line ${line.product_id}`, `${line.quantity} × ${line.state}${line.reason ? `, ${word(line.reason)}` : ""}`]);
  const body = el("tbody", "", ...rows.map(([k, v]) => row(head("row", "dim", word(k)), el("td", "id n", v))));
  return el("table", "", el("caption", "hidden", `What is known of ${id}`), body);
}

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const id = $("ask-id").value.trim();
  if (!id) return;
  try {
    fill($("answer"), await lookUp(id));
  } catch {
    fill($("answer"), el("p", "bad-text", "No answer from this worker."));
  }
});

// Sizes and colours

const sizes = new ResizeObserver(() => {
  for (const { id, plot } of charts) { const box = $(`plot-${id}`); if (plot && box.clientWidth) plot.setSize({ width: box.clientWidth, height: box.clientHeight }); }
});
for (const { id } of charts) sizes.observe($(`plot-${id}`));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { charts.forEach(draw); redraw(); });

poll();
