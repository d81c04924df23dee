"use strict";
// Text from users, files or the server is only inserted as text, or as the address of an image, never as HTML.
const byId = (id) => document.getElementById(id);
const maxPages = Number(document.body.dataset.pages);
const maxPdfBytes = Number(document.body.dataset.pdfBytes);
const modelName = document.body.dataset.model;
const DEFECTS = {
  no_think: "it has no closed reasoning",
  no_answer: "it has no list of pages",
  not_a_list: "its list can't be read",
  not_integers: "its list has entries that are no page numbers",
  empty: "its list is empty",
  duplicates: "its list names a page twice",
  out_of_range: "its list names a page that does not exist",
  missing_ids: "its list leaves out pages, which follow in their given order",
  cut_off: "its reasoning became too long and was cut off before the list",
};
let pages = [];          // {name, shortName, image}: `image` is a data URL
let running = null;      // the AbortController of the current task, or null

function newElement(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function setStatus(text) { byId("status").textContent = text; }
function setProblem(text) { byId("problem").textContent = text; if (text) setStatus(""); }
function pageCount(n) { return n === 1 ? "1 page" : n + " pages"; }

async function post(path, type, body, signal) {
  const headers = { "Content-Type": type };
  if (byId("key").value) headers.Authorization = "Bearer " + byId("key").value;
  const response = await fetch(path, { method: "POST", headers, body, signal });
  let json;
  try { json = await response.json(); } catch { json = null; }
  if (response.ok && json) return json;
  if (response.status === 401) { byId("key-field").hidden = false; byId("key").focus(); }
  throw new Error(json && json.error ? json.error.message : "the server answered with status " + response.status);
}

// Runs one task at a time. It disables the other controls, shows the elapsed time, and lets the Stop button abort it.
async function runTask(task) {
  if (running) return;
  running = new AbortController();
  const started = performance.now();
  let step = "";
  const showStep = (text) => { step = text; setStatus(text + "…"); };
  const clock = setInterval(() => setStatus(`${step}… ${((performance.now() - started) / 1000).toFixed(0)} s`), 1000);
  byId("submit").disabled = byId("clear").disabled = byId("files").disabled = true;
  byId("stop").hidden = false;
  setProblem("");
  try {
    await task(showStep, running.signal, started);
  } catch (error) {
    setProblem(error.name === "AbortError" ? "Stopped." : error instanceof TypeError ? "The server can't be reached." : error.message);
  } finally {
    clearInterval(clock);
    running = null;
    byId("submit").disabled = byId("clear").disabled = byId("files").disabled = false;
    byId("stop").hidden = true;
  }
}

const readDataUrl = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(new Error(file.name + ": can't be read"));
  reader.readAsDataURL(file);
});

async function addFiles(files) {
  if (running) return;
  const notes = [];
  const problems = [];  // one for each file that can't be added; the others are added
  await runTask(async (showStep, signal) => {
    for (const file of files) {
      const isPdf = file.type === "application/pdf" || /\.pdf$/i.test(file.name);
      const room = maxPages - pages.length;
      if (room <= 0) { notes.push(`${file.name} was not added: the limit is ${pageCount(maxPages)}`); continue; }
      if (file.type === "image/tiff" || /\.tiff?$/i.test(file.name)) {
        problems.push(`${file.name}: browsers can't show TIFF; save it as PDF or PNG`);
      } else if (isPdf) {
        if (file.size > maxPdfBytes) { problems.push(`${file.name}: larger than ${maxPdfBytes / 1e6} MB`); continue; }
        showStep("Rendering " + file.name);
        let pdf;
        try {
          pdf = await post("/pages", "application/pdf", file, signal);
        } catch (error) {
          if (error.name === "AbortError" || error instanceof TypeError) throw error;
          problems.push(`${file.name}: ${error.message.replace(/^body: /, "")}`);
          continue;
        }
        const added = pdf.pages.slice(0, room);
        if (added.length < pdf.n_pages) notes.push(`${file.name} has ${pageCount(pdf.n_pages)}; only the first ${added.length} were added`);
        for (const page of added) pages.push({ name: `${file.name}, page ${page.number}`, shortName: "page " + page.number, image: page.image });
      } else if (file.type.startsWith("image/")) {
        pages.push({ name: file.name, shortName: file.name, image: await readDataUrl(file) });
      } else {
        problems.push(`${file.name}: neither a PDF nor an image`);
      }
    }
    if (problems.length) throw new Error(problems.join(". "));
  });
  showSelection();
  setStatus(notes.join(". "));
  byId("files").value = "";
  if (pages.length && !byId("query").value) byId("query").focus();
}

function pageImage(page) {
  const frame = newElement("span", "frame");
  const image = newElement("img", "page-image");
  image.src = page.image;
  image.alt = "";
  image.addEventListener("error", () => frame.replaceChildren(newElement("span", "absent", "this browser can't show it")));
  frame.append(image);
  return frame;
}

function showSelection() {
  byId("selection").hidden = pages.length === 0;
  byId("count").textContent = pageCount(pages.length);
  byId("pages").replaceChildren(...pages.map((page, i) => {
    const item = newElement("li", "place");
    const remove = newElement("button", "remove", "×");
    remove.type = "button";
    remove.setAttribute("aria-label", "Remove " + page.name);
    remove.addEventListener("click", () => {
      if (running) return;
      pages.splice(i, 1);
      showSelection();
      const next = byId("pages").querySelectorAll(".remove")[Math.min(i, pages.length - 1)];
      (next || byId("files")).focus();
    });
    const name = newElement("span", "number", page.shortName);
    name.title = page.name;
    item.append(pageImage(page), name, remove);
    return item;
  }));
}

function enlarge(page) {
  byId("zoomed").src = page.image;
  byId("zoomed").alt = page.name;
  byId("zoom-name").textContent = page.name;
  byId("zoom").showModal();
}

function resultCard(result, rank, page, hasScores) {
  const card = newElement("li", rank === 1 ? "result first" : "result");
  const button = newElement("button", "enlarge");
  button.type = "button";
  button.setAttribute("aria-label", `Rank ${rank}: ${page.name}. Enlarge.`);
  button.append(pageImage(page), newElement("span", "rank", String(rank)));
  button.addEventListener("click", () => enlarge(page));
  const text = newElement("div");
  const meter = newElement("p", hasScores ? "meter" : "meter by-rank");
  const bar = newElement("span", "bar");
  const fill = newElement("i");
  fill.style.width = Math.round(100 * Math.min(1, Math.max(0, result.relevance_score))) + "%";
  bar.append(fill);
  bar.setAttribute("aria-hidden", "true");
  meter.append(bar, newElement("span", "", `score ${result.relevance_score.toFixed(3)}${hasScores ? "" : ", from the rank only"}`));
  text.append(newElement("h3", "", page.name), meter);
  if (result.reasoning) {
    const verdict = /, so it (helps|does not help)\.$/.exec(result.reasoning);
    const note = newElement("p", "page-reasoning", result.reasoning);
    if (verdict) note.prepend(newElement("b", verdict[1] === "helps" ? "verdict helps" : "verdict", verdict[1]), " ");
    text.append(note);
  }
  card.append(button, text);
  return card;
}

function showResults(response, query, rankedPages, seconds) {
  byId("results-query").textContent = query;
  byId("timing").textContent = `${pageCount(rankedPages.length)} in ${seconds.toFixed(1)} s · ${response.usage.total_tokens} tokens generated · ${modelName}`;
  byId("ranked").replaceChildren(...response.results.map((result, i) => resultCard(result, i + 1, rankedPages[result.index], response.has_scores)));
  byId("defects").hidden = response.defects.length === 0;
  byId("defect-list").replaceChildren(...response.defects.map((defect) => newElement("li", "", DEFECTS[defect] || defect.replaceAll("_", " "))));
  byId("reasoning").textContent = response.reasoning || "";
  byId("reasoning-details").hidden = !response.reasoning;
  byId("results").hidden = false;
  byId("results").focus();
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const query = byId("query").value.trim();
  if (!pages.length) { setProblem("Choose a PDF or images first."); byId("files").focus(); return; }
  if (!query) { setProblem("Enter a question."); byId("query").focus(); return; }
  runTask(async (showStep, signal, started) => {
    showStep("Ranking " + pageCount(pages.length));
    const rankedPages = [...pages];
    const body = JSON.stringify({ query, documents: rankedPages.map((page) => page.image), return_reasoning: true });
    const response = await post("/v1/rerank", "application/json", body, signal);
    showResults(response, query, rankedPages, (performance.now() - started) / 1000);
    setStatus("Done. The results are below.");
  });
});
byId("files").addEventListener("change", () => addFiles([...byId("files").files]));
byId("clear").addEventListener("click", () => { pages = []; showSelection(); setStatus(""); byId("files").focus(); });
byId("stop").addEventListener("click", () => running && running.abort());
byId("zoom-close").addEventListener("click", () => byId("zoom").close());
byId("zoom").addEventListener("click", (event) => { if (event.target === byId("zoom")) byId("zoom").close(); });
for (const name of ["dragover", "drop"]) document.addEventListener(name, (event) => event.preventDefault());
byId("drop").addEventListener("dragover", () => byId("drop").classList.add("over"));
byId("drop").addEventListener("dragleave", () => byId("drop").classList.remove("over"));
byId("drop").addEventListener("drop", (event) => {
  byId("drop").classList.remove("over");
  addFiles([...event.dataTransfer.files]);
});
