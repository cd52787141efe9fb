// Files that are chosen or dropped go to POST /predict one by one; what comes back becomes a card and a row of the table.
// Text from outside becomes text alone (textContent); nothing here makes HTML of it.
"use strict";

const AT_ONCE = 2; // one is looked at while the next is on its way
const TRIES = 60; // of a file, while the server is busy

const at = (id) => document.getElementById(id);
const maxFile = Number(document.body.dataset.maxFile);
const classes = JSON.parse(document.body.dataset.classes);
const columns = ["path", "prediction", ...classes.map((name) => `p_${name}`), "threshold", "error"];

let jobs = []; // {file, card, row, result}, in the order in which they came; result is null until it is there
let waiting = [];
let running = 0;
let round = new AbortController(); // ended by "Clear"

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

const plural = (number, what) => `${number.toLocaleString("en")} ${what}${number === 1 ? "" : "s"}`;
// never 1.000 nor 0.000, which nobody knows that well
const shown = (p) => (p > 0.9995 ? "> 0.999" : p < 0.0005 ? "< 0.001" : p.toFixed(3));
const significant = (p) => String(Number(p.toPrecision(4)));

// Taking files in

function add(files) {
  if (!files.length) {
    at("status").textContent = "No file in what was dropped.";
    return;
  }
  const added = [...files].map((file) => {
    const job = { file, result: null, card: make("li", "card"), row: make("tr") };
    job.card.append(heading(job.file.name, "waiting", "waiting"));
    return job;
  });
  jobs.push(...added);
  waiting.push(...added);
  at("cards").append(...added.map((job) => job.card));
  at("rows").append(...added.map((job) => job.row));
  at("results").hidden = false;
  document.body.classList.add("begun");
  if (jobs.length > added.length) added[0].card.scrollIntoView({ block: "start" });
  tell();
  while (running < AT_ONCE && waiting.length) work(round);
}

async function work(mine) {
  running += 1;
  while (waiting.length && mine === round) {
    const job = waiting.shift();
    job.card.querySelector(".call").textContent = "looking …";
    const result = await ask(job.file, mine.signal);
    if (mine !== round) return; // cleared meanwhile, and counted anew
    job.result = result;
    show(job);
    fillRow(job);
    tell(job);
  }
  if (mine === round) running -= 1;
}

const failed = (file, why, threshold = null) => ({
  file: file.name,
  prediction: null,
  threshold,
  error: `${file.name}: ${why}`,
});

async function ask(file, signal) {
  if (file.size > maxFile) {
    return failed(file, `${Math.ceil(file.size / 1e6)} MB; at most ${Math.floor(maxFile / 1e6)} MB are read`);
  }
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    return failed(file, "can't be read; is it a folder, or was it moved?");
  }
  for (let tries = 0; tries < TRIES; tries += 1) {
    const form = new FormData();
    form.append("file", file, file.name);
    try {
      const response = await fetch("predict", { method: "POST", body: form, signal });
      const wait = Number(response.headers.get("Retry-After"));
      if (response.status === 503) {
        await new Promise((resolve) => setTimeout(resolve, 1000 * (wait || 1)));
        continue;
      }
      const answer = await response.json();
      if (!answer.predictions) return failed(file, answer.error);
      const result = answer.predictions[0];
      if (result.error) return failed(file, result.error.replace(`${result.file}: `, ""), result.threshold);
      return { ...result, file: file.name }; // on its way, quotation marks in the name became %22
    } catch {
      if (signal.aborted) return null;
      return failed(file, "no answer from the server; is it still running?");
    }
  }
  return failed(file, "the server is busy; try again later");
}

// Showing results

function heading(name, text, kind) {
  return make("div", "head", make("h3", "", name), make("span", `call ${kind}`, text));
}

function show(job) {
  const { card, result } = job;
  if (result.error) {
    card.classList.add("bad");
    card.replaceChildren(heading(job.file.name, "not read", ""), make("p", "", reason(job)));
    return;
  }
  const positive = document.body.dataset.positive;
  const isPositive = result.prediction === positive;
  card.classList.toggle("positive", isPositive);
  const button = make("button", "pictures", ...pictures(job));
  button.type = "button";
  button.setAttribute("aria-label", `Enlarge the image and the heat map of ${job.file.name}`);
  button.addEventListener("click", () => enlarge(job));
  card.replaceChildren(heading(job.file.name, result.prediction, isPositive ? "positive" : ""), button, score(result));
}

const reason = (job) => {
  const text = job.result.error.slice(`${job.file.name}: `.length);
  return text.charAt(0).toUpperCase() + text.slice(1);
};

function pictures(job) {
  const { result } = job;
  const one = (source, alt, caption) => {
    const frame = make("span", "frame");
    if (source) {
      const image = make("img");
      image.src = source;
      image.alt = alt;
      frame.append(image);
    } else {
      frame.classList.add("empty");
      frame.textContent = alt;
    }
    return make("span", "picture", frame, make("span", "caption", caption));
  };
  return [
    one(result.image, `X-ray ${job.file.name}`, "As read"),
    one(
      result.heatmap,
      result.heatmap ? `Heat map of ${job.file.name}: what spoke for ${result.prediction}` : result.note,
      `Heat map for ${result.prediction}`,
    ),
  ];
}

function score(result) {
  const parts = [];
  const positive = document.body.dataset.positive;
  const decided = result.threshold !== null;
  const named = decided ? [positive] : classes;
  for (const name of named) {
    const p = result.probabilities[name];
    const fill = make("div", "fill");
    fill.style.width = `${100 * p}%`;
    const track = make("div", "track", fill);
    track.setAttribute("aria-hidden", "true");
    if (decided) {
      const mark = make("div", "mark");
      mark.style.left = `${100 * result.threshold}%`;
      track.append(mark);
    }
    const label = decided ? `Probability of ${name}` : name;
    parts.push(make("div", "line", make("span", "", label), make("strong", "", shown(p))), track);
  }
  const kind = document.body.dataset.calibrated === "true" ? "calibrated" : "not calibrated";
  let why = `The most probable class is called. Probabilities: ${kind}.`;
  if (decided) {
    const side = result.prediction === positive ? "at or above" : "below";
    why = `Called ${result.prediction}: ${side} the threshold of ${significant(result.threshold)} (the mark). Probability: ${kind}.`;
  }
  return make("div", "score", ...parts, make("p", "why", why));
}

function enlarge(job) {
  at("large-title").textContent = `${job.file.name}: ${job.result.prediction}`;
  at("large").querySelector(".pictures").replaceChildren(...pictures(job));
  at("large").showModal();
}

function tell(last) {
  const done = jobs.filter((job) => job.result);
  const bad = done.filter((job) => job.result.error).length;
  const calls = classes.map((name) => [done.filter((job) => job.result.prediction === name).length, name]);
  const counts = calls.filter(([count]) => count).map(([count, name]) => `${count} ${name}`);
  if (bad) counts.push(`${bad} not read`);
  at("counts").textContent = counts.join(", ");
  const left = jobs.length - done.length;
  let text = left ? `${done.length} of ${plural(jobs.length, "file")} done.` : `${plural(jobs.length, "file")} done.`;
  if (last) {
    const result = last.result;
    const p = result.error ? null : result.probabilities[result.prediction];
    const news = p === null ? `not read. ${reason(last)}` : `${result.prediction}, probability ${shown(p)}`;
    text += ` ${last.file.name}: ${news}`;
  }
  at("status").textContent = text;
  at("download").disabled = !done.length;
}

// The table, on the page and as a file

const values = (result) => [
  result.file,
  result.prediction,
  ...classes.map((name) => (result.probabilities ? result.probabilities[name] : null)),
  result.threshold,
  result.error,
];

function header() {
  const cells = columns.map((name) => {
    const cell = make("th", name.startsWith("p_") || name === "threshold" ? "n" : "", name === "path" ? "file" : name);
    cell.scope = "col";
    return cell;
  });
  return make("tr", "", ...cells);
}

function fillRow(job) {
  const [file, prediction, ...rest] = values(job.result);
  const error = rest.pop();
  const first = make("th", "", file);
  first.scope = "row";
  const numbers = rest.map((p) => make("td", "n", p === null ? "" : p.toFixed(4)));
  const fault = make("td", "fault", error ? reason(job) : "");
  job.row.replaceChildren(first, make("td", "", prediction ?? ""), ...numbers, fault);
}

// A spreadsheet takes text that begins like this for a formula, and runs it.
const guarded = (text) => (/^[=+\-@\t\r\n＝＋－＠]/.test(text) ? `'${text}` : text);

function csvCell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(value);
  const text = guarded(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function download() {
  const lines = [columns, ...jobs.filter((job) => job.result).map((job) => values(job.result))];
  const text = lines.map((line) => `${line.map(csvCell).join(",")}\n`).join("");
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = "predictions.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function clear() {
  round.abort();
  round = new AbortController();
  jobs = [];
  waiting = [];
  running = 0;
  at("cards").replaceChildren();
  at("rows").replaceChildren();
  at("results").hidden = true;
  document.body.classList.remove("begun");
  at("status").textContent = "Cleared.";
  at("files").focus();
}

// Dropping: anywhere on the page, so that a file that misses the frame is not opened in place of the page

async function inFolder(folder) {
  const reader = folder.createReader();
  const entries = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)).catch(() => []);
    if (!some.length) break; // it gives a hundred at a time
    entries.push(...some);
  }
  entries.sort((a, b) => (a.name < b.name ? -1 : 1));
  const found = [];
  for (const entry of entries) {
    if (entry.name.startsWith(".")) continue;
    if (entry.isDirectory) found.push(...(await inFolder(entry)));
    else found.push(await new Promise((resolve) => entry.file(resolve, () => resolve(new File([], entry.name)))));
  }
  return found;
}

async function dropped(transfer) {
  const parts = []; // taken at once: after the event the transfer is empty
  for (const item of transfer.items) {
    if (item.kind !== "file") continue;
    const entry = item.webkitGetAsEntry?.();
    parts.push(entry?.isDirectory ? entry : item.getAsFile());
  }
  const found = [];
  for (const part of parts) found.push(...(part instanceof File ? [part] : await inFolder(part)));
  return found;
}

at("head").append(header());
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("over");
});
document.addEventListener("drop", async (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  add(await dropped(event.dataTransfer));
});
at("files").addEventListener("change", () => {
  add(at("files").files);
  at("files").value = ""; // so that the same file can be chosen again
});
at("download").addEventListener("click", download);
at("clear").addEventListener("click", clear);
at("close").addEventListener("click", () => at("large").close());
at("large").addEventListener("click", (event) => {
  if (event.target === at("large")) at("large").close();
});
