"use strict";
// What comes from a user, a file or the server is only ever set as text or as the address of a picture.
const at = (id) => document.getElementById(id);
const most = Number(document.body.dataset.pages);
const pdfBytes = Number(document.body.dataset.pdfBytes);
let pages = [];          // {name, short, image}: a data URL, and what to call it in full and below its picture
let running = null;      // an AbortController while something is asked of the server

function made(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function tell(text) { at("status").textContent = text; }
function complain(text) { at("problem").textContent = text; if (text) tell(""); }

async function ask(path, type, body, signal) {
  const headers = { "Content-Type": type };
  if (at("key").value) headers.Authorization = "Bearer " + at("key").value;
  const response = await fetch(path, { method: "POST", headers, body, signal });
  let answered;
  try { answered = await response.json(); } catch { answered = null; }
  if (response.ok && answered) return answered;
  if (response.status === 401) { at("keys").hidden = false; at("key").focus(); }
  throw new Error(answered && answered.error ? answered.error.message : "the server answered " + response.status);
}

// One thing at a time: the buttons say so, and Stop ends it.
async function busy(work) {
  if (running) return;
  running = new AbortController();
  const started = performance.now();
  let doing = "";
  const show = (text) => { doing = text; tell(text + "…"); };
  const clock = setInterval(() => tell(`${doing}… ${((performance.now() - started) / 1000).toFixed(0)} s`), 1000);
  at("go").disabled = at("clear").disabled = at("files").disabled = true;
  at("stop").hidden = false;
  complain("");
  try {
    await work(show, running.signal, started);
  } catch (error) {
    complain(error.name === "AbortError" ? "Stopped." : error instanceof TypeError ? "The server can't be reached." : error.message);
  } finally {
    clearInterval(clock);
    running = null;
    at("go").disabled = at("clear").disabled = at("files").disabled = false;
    at("stop").hidden = true;
  }
}

const asDataUrl = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(new Error(file.name + ": can't be read"));
  reader.readAsDataURL(file);
});

async function take(files) {
  if (running) return;
  const notes = [];
  await busy(async (show, signal) => {
    for (const file of files) {
      const room = most - pages.length;
      if (room <= 0) { notes.push(`${file.name} was left out: ${most} pages are the most`); continue; }
      if (file.type === "application/pdf" || /\.pdf$/i.test(file.name)) {
        if (file.size > pdfBytes) throw new Error(`${file.name}: more than ${pdfBytes / 1e6} MB`);
        show("Rendering " + file.name);
        const pdf = await ask("/pages", "application/pdf", file, signal);
        const taken = pdf.pages.slice(0, room);
        if (taken.length < pdf.n_pages) notes.push(`${file.name} has ${pdf.n_pages} pages; the first ${taken.length} were taken`);
        for (const page of taken) pages.push({ name: `${file.name}, page ${page.number}`, short: "page " + page.number, image: page.image });
      } else if (file.type.startsWith("image/")) {
        pages.push({ name: file.name, short: file.name, image: await asDataUrl(file) });
      } else {
        throw new Error(`${file.name}: neither a PDF nor a picture`);
      }
    }
  });
  shelve();
  tell(notes.join(". "));
  at("files").value = "";
  if (pages.length && !at("query").value) at("query").focus();
}

function picture(page) {
  const frame = made("span", "frame");
  const image = made("img", "sheet-img");
  image.src = page.image;
  image.alt = "";
  image.addEventListener("error", () => frame.replaceChildren(made("span", "absent", "this browser can't show it")));
  frame.append(image);
  return frame;
}

function shelve() {
  at("shelf").hidden = pages.length === 0;
  at("count").textContent = pages.length === 1 ? "1 page" : pages.length + " pages";
  at("pages").replaceChildren(...pages.map((page, i) => {
    const item = made("li", "place");
    const away = made("button", "away", "×");
    away.type = "button";
    away.setAttribute("aria-label", "Remove " + page.name);
    away.addEventListener("click", () => {
      if (running) return;
      pages.splice(i, 1);
      shelve();
      const next = at("pages").querySelectorAll(".away")[Math.min(i, pages.length - 1)];
      (next || at("files")).focus();
    });
    const name = made("span", "number", page.short);
    name.title = page.name;
    item.append(picture(page), name, away);
    return item;
  }));
}

function enlarge(page) {
  at("zoomed").src = page.image;
  at("zoomed").alt = page.name;
  at("zoom-name").textContent = page.name;
  at("zoom").showModal();
}

function card(result, rank, page, hasScores) {
  const item = made("li", rank === 1 ? "found first" : "found");
  const look = made("button", "look");
  look.type = "button";
  look.setAttribute("aria-label", `Rank ${rank}: ${page.name}. Enlarge.`);
  look.append(picture(page), made("span", "rank", String(rank)));
  look.addEventListener("click", () => enlarge(page));
  const words = made("div");
  const meter = made("p", hasScores ? "meter" : "meter by-rank");
  const bar = made("span", "bar");
  const filled = made("i");
  filled.style.width = Math.round(100 * Math.min(1, Math.max(0, result.relevance_score))) + "%";
  bar.append(filled);
  bar.setAttribute("aria-hidden", "true");
  meter.append(bar, made("span", "", `score ${result.relevance_score.toFixed(3)}${hasScores ? "" : ", from the rank alone"}`));
  words.append(made("h3", "", page.name), meter);
  if (result.reasoning) words.append(made("p", "says", result.reasoning));
  item.append(look, words);
  return item;
}

function present(answered, query, shown, seconds) {
  at("asked").textContent = query;
  const pagesText = shown.length === 1 ? "1 page" : shown.length + " pages";
  at("timing").textContent = `${pagesText} in ${seconds.toFixed(1)} s · ${answered.usage.total_tokens} tokens written · ${answered.model}`;
  at("ranked").replaceChildren(...answered.results.map((result, i) => card(result, i + 1, shown[result.index], answered.has_scores)));
  at("flaw").hidden = answered.defects.length === 0;
  at("defects").replaceChildren(...answered.defects.map((defect) => made("li", "", defect.replaceAll("_", " "))));
  at("reasoning").textContent = answered.reasoning || "";
  at("think").hidden = !answered.reasoning;
  at("results").hidden = false;
  at("results").focus();
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const query = at("query").value.trim();
  if (!pages.length) { complain("Choose a PDF or pictures first."); at("files").focus(); return; }
  if (!query) { complain("Ask a question."); at("query").focus(); return; }
  busy(async (show, signal, started) => {
    show(pages.length === 1 ? "Reading 1 page" : `Reading ${pages.length} pages`);
    const shown = [...pages];
    const body = JSON.stringify({ query, documents: shown.map((page) => page.image), return_reasoning: true });
    const answered = await ask("/v1/rerank", "application/json", body, signal);
    present(answered, query, shown, (performance.now() - started) / 1000);
    tell("Done: the results are below.");
  });
});
at("files").addEventListener("change", () => take([...at("files").files]));
at("clear").addEventListener("click", () => { pages = []; shelve(); tell(""); at("files").focus(); });
at("stop").addEventListener("click", () => running && running.abort());
at("zoom-close").addEventListener("click", () => at("zoom").close());
at("zoom").addEventListener("click", (event) => { if (event.target === at("zoom")) at("zoom").close(); });
for (const name of ["dragover", "drop"]) document.addEventListener(name, (event) => event.preventDefault());
at("drop").addEventListener("dragover", () => at("drop").classList.add("over"));
at("drop").addEventListener("dragleave", () => at("drop").classList.remove("over"));
at("drop").addEventListener("drop", (event) => {
  at("drop").classList.remove("over");
  take([...event.dataTransfer.files]);
});
