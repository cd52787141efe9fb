// Sends each chosen or dropped file to POST /predict, and shows each answer as a card and as a row of the table.
// Text from outside is only ever set as text (textContent), never parsed as HTML.
"use strict";

const MAX_RUNNING = 2; // requests: one file is predicted while the next one is sent
const MAX_TRIES = 60; // requests for one file while the server is busy

const byId = (id) => document.getElementById(id);
const maxFile = Number(document.body.dataset.maxFile);
const classes = JSON.parse(document.body.dataset.classes);
const columns = JSON.parse(document.body.dataset.columns); // [{name, isNumber}], as the server names them in a row

let jobs = []; // {file, card, row, result}, in the order in which they were added; result is null until it arrives
let waiting = [];
let running = 0;
let session = new AbortController(); // "Clear" aborts it and starts another one

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

const countOf = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
// never 1.000 or 0.000: no probability is known that precisely
const shown = (p) => (p > 0.9995 ? "> 0.999" : p < 0.0005 ? tiny(p) : p.toFixed(3));
// of a small prevalence all probabilities, and the threshold, are small
const tiny = (p) => (document.body.dataset.prevalence ? p.toPrecision(3) : "< 0.001");
const significant = (p) => String(Number(p.toPrecision(4)));

// Adding files and sending them

function add(files) {
  if (!files.length) {
    byId("status").textContent = "The dropped item contains no file.";
    return;
  }
  const added = [...files].map((file) => {
    const job = { file, result: null, card: make("li", "card"), row: make("tr") };
    job.card.append(heading(job.file.name, "waiting", "waiting"));
    return job;
  });
  jobs.push(...added);
  waiting.push(...added);
  byId("cards").append(...added.map((job) => job.card));
  byId("rows").append(...added.map((job) => job.row));
  byId("results").hidden = false;
  document.body.classList.add("begun");
  if (jobs.length > added.length) added[0].card.scrollIntoView({ block: "start" });
  updateStatus();
  while (running < MAX_RUNNING && waiting.length) work(session);
}

async function work(ownSession) {
  running += 1;
  while (waiting.length && ownSession === session) {
    const job = waiting.shift();
    job.card.querySelector(".call").textContent = "predicting …";
    const result = await predict(job.file, ownSession.signal);
    if (ownSession !== session) return; // "Clear" was pressed, and has set `running` to 0
    job.result = result;
    show(job);
    job.row.replaceChildren(...columns.map((column) => cellOf(job, column)));
    updateStatus(job);
  }
  if (ownSession === session) running -= 1;
}

function failed(file, reason, row = {}) {
  const error = `${file.name}: ${reason}`;
  return { prediction: null, error, row: { ...row, path: file.name, error } };
}

async function predict(file, signal) {
  if (file.size > maxFile) {
    return failed(file, `${Math.ceil(file.size / 1e6)} MB; the maximum is ${Math.floor(maxFile / 1e6)} MB`);
  }
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    return failed(file, "cannot be read; is it a folder, or was it moved?");
  }
  for (let tries = 0; tries < MAX_TRIES; tries += 1) {
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
      if (result.error) return failed(file, result.error.replace(`${result.file}: `, ""), result.row);
      return { ...result, row: { ...result.row, path: file.name } }; // the form changes quotation marks to %22
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
  const button = make("button", "pictures", ...pictures(job), make("span", "enlarge", "Enlarge"));
  button.type = "button";
  button.addEventListener("click", () => enlarge(job));
  card.replaceChildren(heading(job.file.name, result.prediction, isPositive ? "positive" : ""), button, score(result));
}

const reason = (job) => {
  const text = job.result.error.slice(`${job.file.name}: `.length);
  return text.charAt(0).toUpperCase() + text.slice(1);
};

function picture(source, alt, caption) {
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
}

function pictures(job) {
  const { result } = job;
  return [
    picture(result.image, `X-ray ${job.file.name}`, "As read"),
    picture(
      result.heatmap,
      result.heatmap ? `Heat map of ${job.file.name}: the regions that supported ${result.prediction}` : result.note,
      result.heatmap ? `Heat map: red speaks for ${result.prediction}` : `Heat map for ${result.prediction}`,
    ),
  ];
}

// what the network sees is squeezed to a square, and its grey values may be spread evenly
const seen = ({ file, result }) =>
  picture(result.seen, `What the network sees of ${file.name}`, "What the network sees");

function score(result) {
  const parts = [];
  const positive = document.body.dataset.positive;
  const hasThreshold = result.threshold !== null;
  const shownClasses = hasThreshold ? [positive] : classes;
  for (const name of shownClasses) {
    const p = result.probabilities[name];
    const fill = make("div", "fill");
    fill.style.width = `${100 * p}%`;
    const track = make("div", "track", fill);
    track.setAttribute("aria-hidden", "true");
    if (hasThreshold) {
      const mark = make("div", "mark");
      mark.style.left = `${100 * result.threshold}%`;
      track.append(mark);
    }
    const label = hasThreshold ? `Probability of ${name}` : name;
    parts.push(make("div", "line", make("span", "", label), make("strong", "", shown(p))), track);
  }
  const kind = document.body.dataset.probabilities;
  let reasonOfCall = `The most probable class is predicted. Probabilities: ${kind}.`;
  if (hasThreshold) {
    const side = result.prediction === positive ? "at or above" : "below";
    reasonOfCall = `Predicted ${result.prediction}: ${side} the threshold of ${significant(result.threshold)} (the mark). Probability: ${kind}.`;
  }
  return make("div", "score", ...parts, make("p", "why", reasonOfCall));
}

function enlarge(job) {
  byId("large-title").textContent = `${job.file.name}: ${job.result.prediction}`;
  byId("large").querySelector(".pictures").replaceChildren(...pictures(job), seen(job));
  byId("large").classList.toggle("positive", job.result.prediction === document.body.dataset.positive);
  byId("large-score").replaceChildren(score(job.result));
  byId("large").showModal();
}

function updateStatus(last) {
  const done = jobs.filter((job) => job.result);
  const bad = done.filter((job) => job.result.error).length;
  const calls = classes.map((name) => [done.filter((job) => job.result.prediction === name).length, name]);
  const counts = calls.filter(([count]) => count).map(([count, name]) => `${count} ${name}`);
  if (bad) counts.push(`${bad} not read`);
  byId("counts").textContent = counts.join(", ");
  const left = jobs.length - done.length;
  const total = countOf(jobs.length, "file");
  let text = left ? `${done.length} of ${total} done.` : `${total} done.`;
  if (last) {
    const result = last.result;
    const p = result.error ? null : result.probabilities[result.prediction];
    const outcome = p === null ? `not read. ${reason(last)}` : `${result.prediction}, probability ${shown(p)}`;
    text += ` ${last.file.name}: ${outcome}`;
  }
  byId("status").textContent = text;
  byId("download").disabled = !done.length;
}

// The table, on the page and as a file

function header() {
  const cells = columns.map(({ name, isNumber }) => {
    const cell = make("th", isNumber ? "n" : "", name === "path" ? "file" : name);
    cell.scope = "col";
    return cell;
  });
  return make("tr", "", ...cells);
}

function cellOf(job, { name, isNumber }) {
  const value = job.result.row[name] ?? "";
  if (name === "path") {
    const cell = make("th", "", value);
    cell.scope = "row";
    return cell;
  }
  if (name === "error") return make("td", "fault", value && reason(job));
  const digits = (number) => (document.body.dataset.prevalence ? String(number) : number.toFixed(4));
  return isNumber ? make("td", "n", value === "" ? "" : digits(value)) : make("td", "", String(value));
}

// A spreadsheet runs some text as a formula; an apostrophe prevents it, as in the table that `predict` writes.
const formula = new RegExp(document.body.dataset.formula);
const guarded = (text) => (formula.test(text) ? `'${text}` : text);

function csvCell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(value);
  const text = guarded(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function download() {
  const names = columns.map((column) => column.name);
  const rows = jobs.filter((job) => job.result).map((job) => names.map((name) => job.result.row[name]));
  const lines = [names, ...rows];
  const text = lines.map((line) => `${line.map(csvCell).join(",")}\n`).join("");
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = "predictions.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function clear() {
  session.abort();
  session = new AbortController();
  jobs = [];
  waiting = [];
  running = 0;
  byId("cards").replaceChildren();
  byId("rows").replaceChildren();
  byId("results").hidden = true;
  document.body.classList.remove("begun");
  byId("status").textContent = "Cleared.";
  byId("files").focus();
}

// Dropping works anywhere on the page: otherwise the browser would replace the page by a file that misses the frame

async function filesIn(folder) {
  const reader = folder.createReader();
  const entries = [];
  for (;;) {
    const batch = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)).catch(() => []);
    if (!batch.length) break; // the browser returns a hundred entries at a time
    entries.push(...batch);
  }
  entries.sort((a, b) => (a.name < b.name ? -1 : 1));
  const files = [];
  for (const entry of entries) {
    if (entry.name.startsWith(".")) continue;
    if (entry.isDirectory) files.push(...(await filesIn(entry)));
    else files.push(await new Promise((resolve) => entry.file(resolve, () => resolve(new File([], entry.name)))));
  }
  return files;
}

async function droppedFiles(transfer) {
  const parts = []; // collected before the first await: the transfer is empty after the event
  for (const item of transfer.items) {
    if (item.kind !== "file") continue;
    const entry = item.webkitGetAsEntry?.();
    parts.push(entry?.isDirectory ? entry : item.getAsFile());
  }
  const files = [];
  for (const part of parts) files.push(...(part instanceof File ? [part] : await filesIn(part)));
  return files;
}

byId("head").append(header());
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
  add(await droppedFiles(event.dataTransfer));
});
byId("files").addEventListener("change", () => {
  add(byId("files").files);
  byId("files").value = ""; // otherwise the same file could not be chosen again
});
byId("download").addEventListener("click", download);
byId("clear").addEventListener("click", clear);
byId("close").addEventListener("click", () => byId("large").close());
byId("large").addEventListener("click", (event) => {
  if (event.target === byId("large")) byId("large").close();
});
