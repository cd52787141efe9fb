// Takes chosen or dropped files, has a few at a time predicted, and shows a page of the answers.

import { outcomeOf, enlarge } from "./enlarged.js";
import { byId, countOf, facts, make, reason } from "./facts.js";
import { predict } from "./requests.js";
import { fillCard, fillRow, header } from "./results.js";
import { saveJson, savePage, saveTable } from "./save.js";

const MAX_RUNNING = 2; // requests: one file is predicted while the next one is sent
const PER_PAGE = 24; // cards that the browser lays out, however many files there are
const STATUS_MS = 2000; // between two messages while files are predicted: a screen reader reads each one

// {file, started, result, chosen, card, row}, in the order in which they were added. `result` is null until it arrives,
// `chosen` is the window of a DICOM file, if it was changed; `card` and `row` are null on other pages.
let jobs = [];
let waiting = [];
let running = 0;
let first = 0; // the number of the first job on this page
let session = new AbortController(); // "Clear" aborts it and starts another one
let nextStatus = 0; // when the next message is due

// Adding files and sending them

function add(files) {
  if (!files.length) {
    byId("status").textContent = "The dropped item contains no file.";
    return;
  }
  const added = [...files].map((file) => ({ file, started: false, result: null, chosen: null, card: null, row: null }));
  const start = jobs.length;
  jobs.push(...added);
  waiting.push(...added);
  byId("results").hidden = false;
  document.body.classList.add("begun");
  showPage(start);
  if (start) jobs[start].card.scrollIntoView({ block: "start" });
  nextStatus = 0;
  updateStatus();
  while (running < MAX_RUNNING && waiting.length) work(session);
}

async function work(ownSession) {
  running += 1;
  while (waiting.length && ownSession === session) {
    const job = waiting.shift();
    job.started = true;
    show(job);
    const result = await predict(job.file, ownSession.signal);
    if (ownSession !== session) return; // "Clear" was pressed, and has set `running` to 0
    job.result = result;
    show(job);
    updateStatus(job);
  }
  if (ownSession === session) running -= 1;
}

// Showing a page of results

function show(job) {
  if (!job.card) return;
  fillCard(job, () => enlarge(job, (changed) => (show(changed), updateStatus())));
  fillRow(job);
}

function showPage(start) {
  for (const job of onPage()) job.card = job.row = null;
  first = start - (start % PER_PAGE);
  for (const job of onPage()) {
    job.card = make("li", "card");
    job.row = make("tr");
    show(job);
  }
  byId("cards").replaceChildren(...onPage().map((job) => job.card));
  byId("rows").replaceChildren(...onPage().map((job) => job.row));
  const end = first + onPage().length;
  byId("pager").hidden = jobs.length <= PER_PAGE;
  byId("where").textContent = `${first + 1} to ${end} of ${jobs.length.toLocaleString("en")}`;
  byId("previous").setAttribute("aria-disabled", first === 0); // disabled, it would lose the focus
  byId("next").setAttribute("aria-disabled", end === jobs.length);
}

const onPage = () => jobs.slice(first, first + PER_PAGE);

function turn(pages) {
  const start = first + pages * PER_PAGE;
  if (start < 0 || start >= jobs.length) return;
  showPage(start);
  byId("results").scrollIntoView({ block: "start" });
}

const answered = () => jobs.filter((job) => job.result);

function updateStatus(last) {
  const done = answered();
  const left = jobs.length - done.length;
  if (left && Date.now() < nextStatus) return;
  nextStatus = Date.now() + STATUS_MS;
  const bad = done.filter((job) => job.result.error).length;
  const calls = [...facts.classes, "uncertain"].map((name) => [
    done.filter((job) => job.result.prediction === name).length,
    name,
  ]);
  const counts = calls.filter(([count]) => count).map(([count, name]) => `${count} ${name}`);
  if (bad) counts.push(`${bad} not read`);
  byId("counts").textContent = counts.join(", ");
  const total = countOf(jobs.length, "file");
  let text = left ? `${done.length} of ${total} done.` : `${total} done.`;
  if (last) text += ` ${last.file.name}: ${last.result.error ? `not read. ${reason(last)}` : outcomeOf(last.result)}`;
  byId("status").textContent = text;
  for (const id of ["save-table", "save-json", "save-page"]) byId(id).disabled = !done.length;
}

function clear() {
  session.abort();
  session = new AbortController();
  jobs = [];
  waiting = [];
  running = 0;
  first = 0;
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
    const file = item.getAsFile();
    const entry = file?.type ? null : item.webkitGetAsEntry?.(); // takes 1.5 ms; a folder has no type
    parts.push(entry?.isDirectory ? entry : file);
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
byId("previous").addEventListener("click", () => turn(-1));
byId("next").addEventListener("click", () => turn(1));
byId("save-table").addEventListener("click", () => saveTable(answered()));
byId("save-json").addEventListener("click", () => saveJson(answered()));
byId("save-page").addEventListener("click", () => savePage(answered()));
byId("clear").addEventListener("click", clear);
