// The frame of the tab: which runs are shown, and when they are read again. What is shown of them
// comes from /view as HTML and is drawn by report/runs.py alone.

const PERIOD = 10_000; // milliseconds between two looks, while the tab is seen
const KEPT = "concept_guard.board"; // where the browser keeps the choice while its tab is open
const NONE = ""; // compared with

/** Build the tab; TensorBoard calls this once. */
export function render() {
  document.documentElement.lang = "en";
  document.title = "concept_guard";
  document.head.append(make("link", { rel: "stylesheet", href: "style.css" }));
  followTheme();
  new Board().start();
}

class Board {
  constructor() {
    this.run = make("select", { id: "run" });
    this.other = make("select", { id: "other" });
    this.button = make("button", { type: "button", textContent: "Refresh" });
    this.byItself = make("input", { type: "checkbox", id: "by-itself" });
    this.said = make("p", { className: "said", role: "status", ariaLive: "polite" });
    this.trouble = make("p");
    this.again = make("button", { type: "button", textContent: "Try again" });
    this.troubleBox = make("div", { className: "trouble", role: "alert", hidden: true }, [
      this.trouble,
      this.again,
    ]);
    this.view = make("main", { id: "view" });
    this.shown = ""; // address of the view that stands in the page
    this.version = ""; // of that view
    this.turn = 0; // of reading: answers to an older one come too late
    this.looked = 0; // when that began
    this.choice = { run: "", other: NONE, byItself: true, ...kept() };
  }

  start() {
    this.byItself.checked = this.choice.byItself;
    const controls = make("form", { className: "controls", ariaLabel: "What is shown" }, [
      make("div", { className: "choice" }, [label(this.run, "Run"), this.run]),
      make("div", { className: "choice" }, [label(this.other, "Compare with"), this.other]),
      this.button,
      make("div", { className: "tick" }, [this.byItself, label(this.byItself, "Update by itself")]),
    ]);
    const frame = make("div", { className: "frame" }, [controls, this.said, this.troubleBox]);
    document.body.replaceChildren(frame, this.view);

    controls.addEventListener("submit", (event) => event.preventDefault());
    controls.addEventListener("change", () => this.choose());
    this.button.addEventListener("click", () => this.read());
    this.again.addEventListener("click", () => this.read());
    this.view.addEventListener("click", goToAnchor);
    document.addEventListener("visibilitychange", () => this.look());
    setInterval(() => this.look(), PERIOD / 10);
    this.say("Reading the runs …");
    this.read();
  }

  /** Read again if it is time to, and somebody sees it: behind other tabs it has no height. */
  look() {
    const seen = document.visibilityState === "visible" && window.innerHeight > 0;
    const due = Date.now() - this.looked >= PERIOD && this.view.ariaBusy !== "true";
    if (this.choice.byItself && seen && due) this.read();
  }

  choose() {
    this.choice = {
      run: this.run.value,
      other: this.other.value === this.run.value ? NONE : this.other.value,
      byItself: this.byItself.checked,
    };
    keep(this.choice);
    if (this.address() !== this.shown) this.say("Reading the run …"); // a long one takes a while
    this.read();
  }

  async read() {
    const mine = ++this.turn;
    this.looked = Date.now();
    this.view.ariaBusy = "true";
    try {
      const listed = await (await answer("runs")).json();
      if (mine !== this.turn) return;
      this.offer(listed);
      if (listed.problem) {
        this.view.replaceChildren(make("p", { className: "panel", textContent: listed.problem }));
        this.shown = "";
        this.troubleBox.hidden = true;
        this.say("No history can be read.");
        return;
      }
      const response = await answer(this.address());
      const html = await response.text();
      if (mine !== this.turn) return;
      this.show(html, response.headers.get("ETag"));
      this.troubleBox.hidden = true;
      this.say(this.summary(listed.folder, response.headers.get("Concept-Guard-Steps")));
    } catch (error) {
      if (mine === this.turn) this.complain(error);
    } finally {
      if (mine === this.turn) this.view.ariaBusy = "false";
    }
  }

  /** Put the runs into the two lists, and keep what was chosen if it is still there. */
  offer({ runs, newest }) {
    if (!runs.includes(this.choice.run)) this.choice.run = newest ?? "";
    const others = runs.filter((name) => name !== this.choice.run);
    if (!others.includes(this.choice.other)) this.choice.other = NONE;
    fill(this.run, runs.length ? runs.map((name) => [name, name]) : [["", "no run yet"]]);
    fill(this.other, [[NONE, "nothing"], ...others.map((name) => [name, name])]);
    this.run.value = this.choice.run;
    this.other.value = this.choice.other;
    this.run.disabled = !runs.length;
    this.other.disabled = !others.length;
  }

  address() {
    const { run, other } = this.choice;
    return `view?${new URLSearchParams({ ...(run && { run }), ...(other && { other }) })}`;
  }

  /** Replace what is shown, if it is not the same; the reader stays where they are. */
  show(html, version) {
    const address = this.address();
    if (address === this.shown && version && version === this.version) return;
    const fresh = make("template", { innerHTML: html }).content;
    if (address === this.shown) replaceInPlace(this.view, fresh);
    else this.view.replaceChildren(fresh);
    [this.shown, this.version] = [address, version];
  }

  summary(folder, steps) {
    const { run, other } = this.choice;
    if (!run) return `No run of a guard so far in ${folder}.`;
    const last = steps.split(",");
    const named = [run, other].slice(0, last.length);
    return named.map((name, at) => `${name}: up to update ${last[at]}`).join("; ") + ".";
  }

  say(text) {
    if (this.said.textContent !== text) this.said.textContent = text; // said aloud once
  }

  complain(error) {
    const known = error instanceof Refusal;
    this.trouble.textContent = known
      ? error.message
      : "TensorBoard does not answer. Is it still running? What is shown was read before.";
    this.troubleBox.hidden = false;
    this.say("The last look has failed.");
  }
}

/** What TensorBoard has answered in words. */
class Refusal extends Error {}

async function answer(address) {
  const response = await fetch(address);
  if (!response.ok) throw new Refusal(`${await response.text()} (${response.status})`);
  return response;
}

function make(tag, properties = {}, children = []) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function label(control, text) {
  return make("label", { htmlFor: control.id, textContent: text });
}

/** Give a list its choices, and leave it alone if it has them: it may be open. */
function fill(select, choices) {
  const now = [...select.options].map((option) => option.value);
  if (select.options.length && String(now) === String(choices.map(([value]) => value))) return;
  select.replaceChildren(...choices.map(([value, text]) => new Option(text, value)));
}

/** Put new content into a view without losing place, focus, open details or loaded pictures. */
function replaceInPlace(view, fresh) {
  const pictures = keyed(view, "img", (image) => image.getAttribute("src"));
  for (const [key, image] of keyed(fresh, "img", (image) => image.getAttribute("src"))) {
    if (pictures.has(key)) image.replaceWith(pictures.get(key)); // loaded: nothing jumps
  }
  const was = keyed(view, "details", wording);
  for (const [key, details] of keyed(fresh, "details", wording)) {
    if (was.has(key)) details.open = was.get(key).open;
  }
  const focused = [...keyed(view, FOCUSABLE, wording)].find(
    ([, element]) => element === document.activeElement,
  );
  const sideways = keyed(view, FOCUSABLE, wording);
  const shifts = [...sideways].map(([key, element]) => [key, element.scrollLeft]);
  const anchor = [...view.querySelectorAll("[id]")].find(
    (element) => element.getBoundingClientRect().bottom > 0,
  );
  const [id, top] = [anchor?.id, anchor?.getBoundingClientRect().top];
  const height = window.scrollY;

  view.replaceChildren(fresh);

  const now = keyed(view, FOCUSABLE, wording);
  for (const [key, left] of shifts) if (left && now.has(key)) now.get(key).scrollLeft = left;
  if (focused) now.get(focused[0])?.focus({ preventScroll: true });
  window.scrollTo(window.scrollX, height);
  const place = id && document.getElementById(id);
  if (place && height) window.scrollBy(0, place.getBoundingClientRect().top - top);
}

const FOCUSABLE = "a[href], summary, button, input, select, [tabindex]";

/** Return the elements by a name that outlives a replacement; equal ones are counted. */
function keyed(root, selector, name) {
  const [found, seen] = [new Map(), new Map()];
  for (const element of root.querySelectorAll(selector)) {
    const said = `${element.localName} ${element.id || name(element)}`;
    const before = seen.get(said) ?? 0;
    seen.set(said, before + 1);
    found.set(`${said} ${before}`, element);
  }
  return found;
}

function wording(element) {
  const speaks = element.querySelector(":scope > summary") ?? element;
  return element.ariaLabel ?? speaks.textContent.trim().slice(0, 80);
}

/** Follow a link within the view: the base address of the page is another one than its own. */
function goToAnchor(event) {
  const href = event.target.closest("a")?.getAttribute("href") ?? "";
  if (!href.startsWith("#")) return;
  event.preventDefault();
  const target = document.getElementById(decodeURIComponent(href.slice(1)));
  if (!target) return;
  for (let up = target; up; up = up.parentElement) if (up.localName === "details") up.open = true;
  target.scrollIntoView();
  if (target.tabIndex < 0) target.tabIndex = -1;
  target.focus({ preventScroll: true });
}

/** Be dark when TensorBoard is, by whichever of its switches. */
function followTheme() {
  const outside = window.parent.document?.body;
  if (!outside || !window.frameElement) return; // opened on its own
  const follow = () => {
    const dark = outside.classList.contains("dark-mode");
    window.frameElement.style.colorScheme = dark ? "dark" : "light";
  };
  follow();
  new MutationObserver(follow).observe(outside, { attributeFilter: ["class"] });
}

function kept() {
  try {
    return JSON.parse(sessionStorage.getItem(KEPT)) ?? {};
  } catch {
    return {}; // nothing is kept where the browser does not allow it
  }
}

function keep(choice) {
  try {
    sessionStorage.setItem(KEPT, JSON.stringify(choice));
  } catch {
    // as above
  }
}
