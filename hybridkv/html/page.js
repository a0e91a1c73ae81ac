"use strict";
// Draws what `run.py` and `prompt.py` wrote down. All text goes in as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const state = { run: 0, token: 0, head: null }; // head: [layer, number], or null for all
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function make(name, attributes = {}, text = "", space = null) {
  const node = space ? document.createElementNS(space, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

// ---- sets, a bit for each member ----

function members(bitmap) {
  const bytes = atob(bitmap), found = [];
  for (let i = 0; i < bytes.length; i++)
    for (let bit = 0, byte = bytes.charCodeAt(i); byte; bit++, byte >>= 1) if (byte & 1) found.push(8 * i + bit);
  return found;
}

const chosen = (layer, head) => !state.head || (state.head[0] === layer && state.head[1] === head);

// How many of the chosen heads store each prompt token whatever the words are: static and whole heads.
function keptCounts(run) {
  const counts = new Uint16Array(data.tokens);
  let heads = 0;
  run.kinds.forEach((row, layer) => row.forEach((kind, head) => {
    if (kind === "dynamic" || !chosen(layer, head)) return;
    heads++;
    if (kind === "whole") counts.forEach((_, i) => counts[i]++);
    else for (const token of members(run.kept[layer][head])) counts[token]++;
  }));
  return { counts, heads };
}

// How many of the chosen dynamic heads fetched each prompt token for this word, and what the word before had not.
function fetchedCounts(run, token) {
  const counts = new Uint16Array(data.tokens), fresh = new Uint8Array(data.tokens);
  const step = run.retrieved[token - 1] || {}, before = run.retrieved[token - 2] || {};
  let chunks = 0, news = 0, heads = 0;
  for (const [name, bitmap] of Object.entries(step)) {
    const [layer, head] = name.split(",").map(Number);
    if (!chosen(layer, head)) continue;
    const had = new Set(before[name] ? members(before[name]) : []);
    heads++;
    for (const chunk of members(bitmap)) {
      chunks++;
      const isNew = !had.has(chunk);
      news += isNew;
      for (const at of run.chunks[chunk] || []) {
        counts[at]++;
        if (isNew) fresh[at] = 1;
      }
    }
  }
  return { counts, fresh, chunks, news, heads };
}

// ---- prompt ----

const spans = []; // [token number, element], of text that may be dropped

function buildPrompt() {
  const prunable = new Set(members(data.prunable));
  const parts = data.texts.map((text) => ({ start: text.start, text }));
  data.inputs.forEach((input, i) => parts.push({ start: input.start, input, i }));
  parts.sort((a, b) => a.start - b.start);
  for (const { text, input, i } of parts) {
    if (input) {
      const kind = input.frames.length > 1 ? `video ${i + 1}: ${input.frames.length} x ` : `picture ${i + 1}: `;
      byId("prompt").append(make("span", { class: "picture" }, ` [${kind}${input.h} x ${input.w} tokens] `));
      continue;
    }
    text.pieces.forEach((piece, n) => {
      if (!prunable.has(text.start + n)) return byId("prompt").append(piece);
      const span = make("span", {}, piece);
      byId("prompt").append(span);
      spans.push([text.start + n, span]);
    });
  }
}

const tint = (color, share) => `color-mix(in srgb, var(--${color}) ${Math.round(100 * share)}%, transparent)`;

function drawPrompt(kept, fetched) {
  for (const [token, span] of spans) {
    const k = kept.heads ? kept.counts[token] / kept.heads : 0, f = fetched.heads ? fetched.counts[token] / fetched.heads : 0;
    const lines = [];
    if (k) lines.push(`inset 0 -3px ${tint("static", 0.3 + 0.7 * k)}`);
    if (fetched.fresh[token]) lines.push("inset 0 2px var(--dynamic)");
    span.style.background = f ? tint("dynamic", 0.15 + 0.6 * f) : "";
    span.style.boxShadow = lines.join(", ");
  }
}

// ---- pictures ----

const canvases = []; // {canvas, image, input, first: its first token, what: "kept" or "fetched"}

function buildPictures() {
  const many = data.inputs.reduce((n, input) => n + input.frames.length, 0) > 4;
  byId("pictures").className = many ? "many" : "";
  data.inputs.forEach((input, i) => input.frames.forEach((frame, t) => {
    const image = new Image(), place = input.frames.length > 1 ? `video ${i + 1}, step ${t + 1}` : `picture ${i + 1}`;
    for (const what of ["kept", "fetched"]) {
      const figure = make("figure"), canvas = make("canvas", { role: "img" });
      canvas.setAttribute("aria-label", `${place}: what is ${what}`);
      const about = { kept: "kept by static heads", fetched: "fetched for this word by dynamic heads" }[what];
      figure.append(make("figcaption", { class: what }, data.inputs.length > 1 || many ? `${place}: ${about}` : about), canvas);
      byId("pictures").append(figure);
      canvases.push({ canvas, image, input, what, figure, first: input.start + t * input.h * input.w });
    }
    image.onload = draw;
    image.src = frame;
  }));
  byId("pictures-section").hidden = !data.inputs.length;
}

function drawPicture({ canvas, image, input, first }, { counts, heads, fresh }) {
  if (!image.naturalWidth) return;
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const paint = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  const [veil, accent] = ["--veil", "--dynamic"].map((name) => style.getPropertyValue(name).trim());
  const width = canvas.width / input.w, height = canvas.height / input.h;
  paint.drawImage(image, 0, 0);
  for (let i = 0; i < input.h * input.w; i++) {
    const share = heads ? counts[first + i] / heads : 0, x = (i % input.w) * width, y = Math.floor(i / input.w) * height;
    paint.fillStyle = `rgba(${veil}, ${share ? 0.5 * (1 - share) ** 2 : 0.86})`;
    paint.fillRect(x, y, width, height);
  }
  if (!fresh) return;
  paint.strokeStyle = accent;
  paint.lineWidth = Math.max(1.5, canvas.width / 500);
  paint.beginPath(); // an outline around what is new
  const isNew = (r, c) => r >= 0 && c >= 0 && r < input.h && c < input.w && fresh[first + r * input.w + c];
  for (let r = 0; r < input.h; r++) for (let c = 0; c < input.w; c++) {
    if (!isNew(r, c)) continue;
    const [l, t, right, b] = [c * width, r * height, (c + 1) * width, (r + 1) * height];
    if (!isNew(r - 1, c)) { paint.moveTo(l, t); paint.lineTo(right, t); }
    if (!isNew(r + 1, c)) { paint.moveTo(l, b); paint.lineTo(right, b); }
    if (!isNew(r, c - 1)) { paint.moveTo(l, t); paint.lineTo(l, b); }
    if (!isNew(r, c + 1)) { paint.moveTo(right, t); paint.lineTo(right, b); }
  }
  paint.stroke();
}

// ---- heads ----

function buildHeads() {
  const run = data.runs[state.run], heads = run.kinds[0].length, layers = run.kinds.length;
  const cell = 22, left = 52, top = 18, across = layers > heads; // long side from left to right
  const columns = across ? layers : heads, rows = across ? heads : layers;
  const width = left + Math.max(columns * cell, 200), height = top + rows * cell;
  const svg = make("svg", { style: `max-width: ${width}px`, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": "heads" }, "", SVG);
  svg.append(make("text", { x: left, y: 12 }, across ? "layer 0 and on, left to right" : "head", SVG));
  for (let r = 0; r < rows; r++)
    svg.append(make("text", { x: 0, y: top + r * cell + 15 }, `${across ? "head" : "layer"} ${r}`, SVG));
  run.kinds.forEach((row, layer) => row.forEach((kind, head) => {
    const [column, line] = across ? [layer, head] : [head, layer], pages = run.pages[layer][head];
    const say = `layer ${layer}, head ${head}: ${kind}, a step reads ${pages} of ${run.all_pages} pages`;
    const rect = make("rect", {
      class: `head ${kind}`, x: left + column * cell + 1, y: top + line * cell + 1, width: cell - 3, height: cell - 3, rx: 3,
      "fill-opacity": (0.35 + 0.65 * Math.sqrt(pages / run.all_pages)).toFixed(2),
      tabindex: 0, role: "button", "aria-label": say, "data-head": `${layer},${head}`,
    }, "", SVG);
    rect.append(make("title", {}, say, SVG));
    const choose = () => { state.head = state.head && chosen(layer, head) ? null : [layer, head]; draw(); };
    rect.addEventListener("click", choose);
    rect.addEventListener("keydown", (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); choose(); } });
    svg.append(rect);
  }));
  byId("heads").replaceChildren(svg);
  const note = byId("heads-note"), count = (kind) => run.kinds.flat().filter((k) => k === kind).length;
  note.replaceChildren();
  for (const kind of ["static", "dynamic", "whole"]) {
    if (!count(kind)) continue;
    note.append(make("span", { class: "key", style: `background: var(--${kind})` }), `${count(kind)} ${kind}`);
  }
  note.append(". Darker: more pages. Choose one to see it alone; Escape shows all.");
}

// ---- answer ----

function buildRuns() {
  if (data.runs.length > 1) data.runs.forEach((run, i) => {
    const label = make("label"), button = make("input", { type: "radio", name: "run", value: i });
    button.checked = i === state.run;
    button.addEventListener("change", () => { state.run = i; state.head = null; build(); });
    label.append(button, ` ${run.name}`);
    byId("runs").append(label);
  });
}

function buildAnswer() {
  const run = data.runs[state.run], slider = byId("token");
  slider.max = Math.max(0, run.answer.length - 1);
  state.token = Math.min(state.token, Number(slider.max));
  byId("answer").replaceChildren(...run.answer.map((piece, i) => {
    const button = make("button", { type: "button", tabindex: -1 }, piece || "\u00b7");
    button.addEventListener("click", () => { state.token = i; draw(); });
    return button;
  }));
}

function sentence(run, fetched) {
  const word = JSON.stringify(run.answer[state.token] ?? "").slice(1, -1).trim();
  const where = `${state.token + 1} of ${run.answer.length}: \u201c${word}\u201d. `;
  if (!run.answer.length) return "The answer is empty.";
  if (!state.token) return where + "The first word comes with reading the prompt, which fetches nothing.";
  if (!fetched.heads) return where + (state.head ? "This head fetches nothing." : "No head fetches: a step reads all that is kept.");
  const heads = fetched.heads === 1 ? "1 head" : `${fetched.heads} heads`;
  return `${where}${heads} fetched ${fetched.chunks} chunks, ${fetched.news} of them new.`;
}

// ---- all of it ----

function draw() {
  const run = data.runs[state.run], kept = keptCounts(run), fetched = fetchedCounts(run, state.token);
  byId("token").value = state.token;
  byId("token").setAttribute("aria-valuetext", run.answer[state.token] ?? "");
  byId("state").textContent = sentence(run, fetched);
  [...byId("answer").children].forEach((node, i) => node.setAttribute("aria-current", i === state.token));
  document.querySelectorAll(".head").forEach((node) =>
    node.setAttribute("aria-pressed", !!state.head && node.dataset.head === state.head.join(",")));
  drawPrompt(kept, fetched);
  const retrieves = run.kinds.flat().includes("dynamic");
  for (const each of canvases) {
    each.figure.hidden = each.what === "fetched" && !retrieves;
    drawPicture(each, each.what === "kept" ? { ...kept, fresh: null } : fetched);
  }
  byId("prompt-legend").hidden = !spans.length;
  byId("legend").textContent = retrieves
    ? "Veiled: by no head. The clearer, the more heads. Outlined: fetched now, and not for the word before."
    : "Veiled: by no head. The clearer, the more heads.";
}

function build() {
  buildAnswer();
  buildHeads();
  draw();
}

byId("token").addEventListener("input", (e) => { state.token = Number(e.target.value); draw(); });
document.addEventListener("keydown", (e) => { if (e.key === "Escape" && state.head) { state.head = null; draw(); } });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
buildPrompt();
buildPictures();
buildRuns();
state.token = 2; // the first word that fetches, and follows one that did
build();
