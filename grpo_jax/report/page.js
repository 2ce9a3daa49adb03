"use strict";
// The page's plots and filters. The text of a model is added to the page only as text nodes, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const HEIGHT = 240, LEFT = 46, RIGHT = 14, TOP = 10, BOTTOM = 26, PAGE = 60;

const build = (element, attributes, children) => {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};
const html = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const COLOURS = 6, DASHES = ["", "7 4", "2 3"];
const colour = (index) => `var(--c${index % COLOURS})`;
/** The dashes that distinguish lines of the same colour, if there are more lines than colours. */
const dash = (index) => DASHES[Math.floor(index / COLOURS) % DASHES.length];

/** A number in few digits; of shares, in percent. */
function number(value, percent = false) {
  if (value === null || value === undefined) return "–";
  if (percent) return `${+(100 * value).toPrecision(3)} %`;
  const size = Math.abs(value);
  return size >= 1e5 || (size > 0 && size < 1e-3) ? value.toExponential(1) : String(+value.toPrecision(4));
}

/** Round numbers between low and high. */
function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * ([1, 2, 5].find((m) => m * power >= raw) ?? 10);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.max(Math.floor(high / step + 1e-9) - first + 1, 0) }, (_, i) => +((first + i) * step).toPrecision(12));
}

/** Axes over [x0, x1] × [y0, y1], redrawn whenever the width changes. `paint` draws the content; `read` returns the text of the tooltip at x, y. */
function plot(title, bounds, percent, paint, read, grid = true) {
  const image = svg("svg", { height: HEIGHT, role: "img", "aria-label": title });
  const tip = html("div", { class: "tip", hidden: "" });
  const box = html("div", { class: "plot" }, image, tip);
  let at = null, cursor = null;
  const draw = () => {
    const width = box.clientWidth;
    if (!width) return;
    const { x0, x1, y0, y1 } = bounds();
    at = {
      x: (value) => LEFT + ((value - x0) / (x1 - x0 || 1)) * (width - LEFT - RIGHT),
      y: (value) => HEIGHT - BOTTOM - ((Math.max(y0, Math.min(y1, value)) - y0) / (y1 - y0 || 1)) * (HEIGHT - TOP - BOTTOM),
      back: (px, py) => [x0 + ((px - LEFT) / (width - LEFT - RIGHT)) * (x1 - x0), y0 + ((HEIGHT - BOTTOM - py) / (HEIGHT - TOP - BOTTOM)) * (y1 - y0)],
    };
    image.replaceChildren();
    image.setAttribute("width", width);
    for (const y of ticks(y0, y1, 4)) {
      if (grid) image.append(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: at.y(y), y2: at.y(y) }));
      image.append(svg("text", { class: "tick", x: LEFT - 6, y: at.y(y) + 4, "text-anchor": "end" }, number(y, percent)));
    }
    for (const x of ticks(x0, x1, width / 90).filter(Number.isInteger))
      image.append(svg("text", { class: "tick", x: at.x(x), y: HEIGHT - 8, "text-anchor": "middle" }, number(x)));
    paint(image, at);
    cursor = image.appendChild(svg("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" }));
  };
  box.addEventListener("pointermove", (event) => {
    const frame = box.getBoundingClientRect(), px = event.clientX - frame.left, py = event.clientY - frame.top;
    const found = at && read(...at.back(px, py));
    tip.hidden = !found;
    cursor?.setAttribute("visibility", found ? "visible" : "hidden");
    if (!found) return;
    tip.replaceChildren(html("b", {}, found.head), ...found.lines.map(([c, text]) => html("div", c === null ? {} : { style: `color:${colour(c)}` }, text)));
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, at.x(found.x));
    const room = frame.width - tip.offsetWidth - 4;
    tip.style.left = `${Math.max(Math.min(px + 14, room), 0)}px`;
    tip.style.top = `${Math.max(py - tip.offsetHeight - 10, 0)}px`;
  });
  box.addEventListener("pointerleave", () => { tip.hidden = true; cursor?.setAttribute("visibility", "hidden"); });
  new ResizeObserver(draw).observe(box);
  return { box, draw };
}

const swatch = (s) => svg("svg", { width: 22, height: 8, "aria-hidden": true }, s.style === "points"
  ? svg("circle", { cx: 11, cy: 4, r: 4, fill: colour(s.colour) })
  : svg("line", { x1: 0, x2: 22, y1: 4, y2: 4, stroke: colour(s.colour), "stroke-width": 2, "stroke-dasharray": dash(s.colour) }));

/** Lines with bands and points with intervals. `series`: {name, colour, x, y, low?, high?, smooth?, style: line|points}. `range`: of the y axis; what lies beyond it is cut. */
function chart({ title, note, percent, range, series, rules = [] }) {
  const limits = () => {
    const xs = series.flatMap((s) => s.x);
    return { x0: Math.min(...xs), x1: Math.max(...xs), y0: range[0], y1: range[1] };
  };
  const paint = (image, at) => {
    const path = (xs, ys) => xs.map((x, i) => `${i ? "L" : "M"}${at.x(x).toFixed(1)} ${at.y(ys[i]).toFixed(1)}`).join("");
    for (const rule of rules) image.append(svg("line", { class: "rule", x1: LEFT, x2: "100%", y1: at.y(rule.value), y2: at.y(rule.value) }, svg("title", {}, rule.name)));
    for (const s of series) {
      const stroke = colour(s.colour);
      if (s.style === "points") {
        s.x.forEach((x, i) => image.append(
          svg("line", { x1: at.x(x), x2: at.x(x), y1: at.y(s.low[i]), y2: at.y(s.high[i]), stroke, "stroke-width": 2 }),
          svg("circle", { cx: at.x(x), cy: at.y(s.y[i]), r: 4, fill: stroke })));
        continue;
      }
      if (s.low) image.append(svg("path", { d: `${path(s.x, s.high)}${path([...s.x].reverse(), [...s.low].reverse()).replace("M", "L")}Z`, fill: stroke, opacity: 0.16 }));
      if (s.smooth) image.append(svg("path", { d: path(s.x, s.y), fill: "none", stroke, opacity: 0.35 }));
      image.append(svg("path", { d: path(s.x, s.smooth ?? s.y), fill: "none", stroke, "stroke-width": 2, "stroke-linejoin": "round", "stroke-dasharray": dash(s.colour) }));
    }
  };
  const read = (x) => {
    const all = series.flatMap((s) => s.x);
    if (!all.length) return null;
    const near = all.reduce((a, b) => (Math.abs(b - x) < Math.abs(a - x) ? b : a));
    const lines = series.flatMap((s) => {
      const i = s.x.indexOf(near);
      if (i < 0) return [];
      const bounds = s.low && s.low[i] !== s.high[i] ? ` [${number(s.low[i], percent)}, ${number(s.high[i], percent)}]` : "";
      return [[s.colour, `${s.name} ${number(s.y[i], percent)}${bounds}`]];
    });
    return { x: near, head: `after ${number(near)} updates`, lines };
  };
  const legend = html("p", { class: "legend" }, ...series.map((s) => html("span", { style: `color:${colour(s.colour)}` }, swatch(s), s.name)),
    ...rules.map((r) => html("span", { class: "dim" }, `${r.name} ${number(r.value, percent)}`)));
  return html("figure", {}, html("h3", {}, title), legend, plot(title, limits, percent, paint, read).box, ...(note ? [html("p", { class: "dim" }, note)] : []));
}

/** A heat map. `columns` and `rows` are edges; `cells[column][row]` in [-1, 1]: the size is the opacity, the sign chooses the colour. */
function heat({ title, note, columns, rows, cells, labels }) {
  const limits = () => ({ x0: columns[0], x1: columns.at(-1), y0: rows[0], y1: rows.at(-1) });
  const paint = (image, at) => cells.forEach((column, i) => column.forEach((value, j) => {
    if (!value) return;
    image.append(svg("rect", { x: at.x(columns[i]), y: at.y(rows[j + 1]), width: at.x(columns[i + 1]) - at.x(columns[i]) + 0.4, height: at.y(rows[j]) - at.y(rows[j + 1]) + 0.4,
      fill: colour(value > 0 ? 0 : 1), opacity: Math.min(Math.abs(value), 1) }));
  }));
  const read = (x, y) => {
    const i = columns.findIndex((edge, k) => edge <= x && x < columns[k + 1]), j = rows.findIndex((edge, k) => edge <= y && y < rows[k + 1]);
    return i < 0 || j < 0 ? null : { x: (columns[i] + columns[i + 1]) / 2, head: labels.columns[i], lines: [[null, `${labels.rows[j]}: ${labels.cells[i][j]}`]] };
  };
  return html("figure", {}, html("h3", {}, title), plot(title, limits, false, paint, read, false).box, html("p", { class: "dim" }, note));
}

/** One plot of whichever metric is chosen. */
function explorer(metrics) {
  const choose = html("select", { "aria-label": "metric" }, ...Object.keys(metrics).map((name) => html("option", {}, name)));
  const place = html("div");
  if ("completions/mean_length" in metrics) choose.value = "completions/mean_length";
  const show = () => place.replaceChildren(chart(metrics[choose.value]));
  choose.addEventListener("change", show);
  show();
  return html("div", {}, html("label", {}, "Any other metric ", choose), place);
}

const MARKS = { G: "in its place", Y: "elsewhere in the word", X: "not in the word" };

/** A Wordle board. `guesses`: [word, marks], with no marks for what the game does not accept. Each tile has its mark as a letter too, and each row says it in words. */
function board(guesses) {
  const row = ([word, marks]) => {
    const letters = [...word];
    const said = marks ? letters.map((letter, i) => `${letter} ${MARKS[marks[i]]}`).join(", ") : "not accepted";
    const tiles = marks
      ? letters.map((letter, i) => html("span", { class: `tile ${marks[i]}`, title: `${letter}: ${MARKS[marks[i]]}` }, letter, html("small", {}, marks[i])))
      : [html("span", { class: "refused" }, word || "(empty)"), html("span", { class: "dim" }, " not accepted")];
    return html("li", {}, html("span", { class: "unseen" }, `${word}: ${said}`), html("span", { "aria-hidden": true, class: "tiles" }, ...tiles));
  };
  return html("ol", { class: "board", "aria-label": "Wordle board" }, ...guesses.map(row));
}

/** What a completion says: a text, or turns [role, text]. */
const words = (said) => (typeof said === "string" ? said : said.map(([, text]) => text).join("\n"));
const speech = (said) =>
  typeof said === "string"
    ? html("pre", {}, said === "" ? "(empty)" : said)
    : html("div", { class: "turns" }, ...said.map(([role, text]) => html("div", { class: `turn ${role === "policy" ? "policy" : "environment"}` }, html("span", { class: "role" }, role), html("pre", {}, text === "" ? "(empty)" : text))));

/** A column of an example: its name and its text; a long text is folded. */
const column = ([name, text]) =>
  text.length > 120 ? html("details", {}, html("summary", {}, `${name} (${text.length} characters)`), html("pre", {}, text)) : html("div", {}, html("span", { class: "dim" }, `${name} `), html("code", {}, text));

/** Completions with filters for run, step, example, reward and text. Rows: [run, step, example, said, reward, advantage, rewards, board]. */
function completions({ runs, examples, rewards, rows }) {
  const place = document.getElementById("completions");
  const options = (select, values, all) => {
    const before = select.value;
    select.replaceChildren(html("option", { value: "" }, all), ...values.map(([value, text]) => html("option", { value }, text)));
    select.value = values.some(([value]) => String(value) === before) ? before : "";
  };
  const field = (label, input) => html("label", {}, label, input);
  const run = html("select"), step = html("select"), example = html("select"), order = html("select", {}, ...["as sampled", "best first", "worst first"].map((text) => html("option", {}, text)));
  const low = html("input", { type: "number", step: "any", placeholder: "any" }), high = low.cloneNode(), search = html("input", { type: "search", placeholder: "any text" });
  const count = html("p", { class: "dim", "aria-live": "polite" }), list = html("div", { class: "rows" }), more = html("button", {}, "show more");
  const short = (text) => (text.length > 60 ? `${text.slice(0, 59)}…` : text || "(empty)");
  let limit = PAGE;

  const matches = (row, but) =>
    (but === "run" || run.value === "" || row[0] === +run.value) && (but === "step" || step.value === "" || row[1] === +step.value) && (but === "example" || example.value === "" || row[2] === +example.value);
  const inRange = (reward) => (low.value === "" || (reward !== null && reward >= +low.value)) && (high.value === "" || (reward !== null && reward <= +high.value));
  const distinct = (column, but) => [...new Set(rows.filter((row) => matches(row, but)).map((row) => row[column]))];
  const body = (said, guesses) => {
    if (!guesses) return speech(said);
    const adds = typeof said !== "string" || said.trim().toUpperCase() !== guesses[0][0];
    return html("div", {}, board(guesses), ...(adds ? [html("details", {}, html("summary", {}, "what was said"), speech(said))] : []));
  };
  const card = ([at, when, which, said, reward, advantage, parts, guesses]) => {
    const detail = rewards.length > 1 ? rewards.map((name, i) => `${name} ${number(parts[i])}`).join("   ") : "";
    const { name, columns } = examples[which];
    return html("article", {},
      body(said, guesses),
      html("div", { class: "facts" }, html("b", {}, number(reward)), " ", html("span", { class: advantage > 0 ? "up" : advantage < 0 ? "down" : "dim" }, advantage === null ? "" : `${advantage < 0 ? "−" : "+"}${Math.abs(advantage).toFixed(2)}`),
        html("span", { class: "dim" }, ` ${runs.length > 1 ? `${runs[at]}, ` : ""}step ${when}${examples.length > 1 ? ` · ${short(name)}` : ""}${detail ? ` · ${detail}` : ""}`),
        ...columns.map(column)));
  };
  const show = () => {
    options(run, distinct(0, "run").map((i) => [i, runs[i]]), "all runs");
    options(step, distinct(1, "step").sort((a, b) => a - b).map((s) => [s, s]), "all steps");
    options(example, distinct(2, "example").map((i) => [i, short(examples[i].label)]), "all examples");
    const wanted = search.value.toLowerCase();
    const found = rows.filter((row) => matches(row) && inRange(row[4]) && `${words(row[3])}\n${examples[row[2]].columns.map(([, text]) => text).join("\n")}`.toLowerCase().includes(wanted));
    if (order.selectedIndex) found.sort((a, b) => (order.selectedIndex === 1 ? b[4] - a[4] : a[4] - b[4]));
    const mean = found.reduce((sum, row) => sum + (row[4] ?? 0), 0) / found.length;
    count.textContent = `${found.length} of ${rows.length} completions, ${new Set(found.map((row) => words(row[3]))).size} different${found.length ? `, mean reward ${number(mean)}` : ""}`;
    list.replaceChildren(...found.slice(0, limit).map(card));
    more.hidden = found.length <= limit;
  };
  for (const input of [run, step, example, order, low, high, search]) input.addEventListener("input", () => { limit = PAGE; show(); });
  more.addEventListener("click", () => { limit += PAGE; show(); });
  const filters = html("div", { class: "filters" }, field("step", step), field("example", example), field("reward from", low), field("to", high), field("order", order), field("search", search));
  if (runs.length > 1) filters.prepend(field("run", run));
  const legend = rows.some((row) => row[7]) ? [html("p", { class: "dim" }, `On the boards: ${Object.entries(MARKS).map(([mark, text]) => `${mark} ${text}`).join(", ")}.`)] : [];
  place.append(filters, count, ...legend, list, more);
  show();
}

const plots = document.getElementById("plots");
plots.append(...data.charts.map(chart), ...data.heat.map(heat));
if (Object.keys(data.metrics).length) plots.append(explorer(data.metrics));
if (data.completions.rows.length) completions(data.completions);
