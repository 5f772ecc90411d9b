// Which page is shown, what all of them share: navigation, theme, the board of both services.

import { about, follow, Refused } from "./api.js";
import { fill, h } from "./dom.js";
import { time } from "./format.js";
import * as alerts from "./pages/alerts.js";
import * as artifact from "./pages/artifact.js";
import * as artifacts from "./pages/artifacts.js";
import * as compare from "./pages/compare.js";
import * as job from "./pages/job.js";
import * as jobs from "./pages/jobs.js";
import * as overview from "./pages/overview.js";
import * as resources from "./pages/resources.js";

const ROUTES = [
  [/^\/$/, overview, "Overview"],
  [/^\/jobs$/, jobs, "Jobs"],
  [/^\/jobs\/(?<service>cognate|agent)\/(?<id>[0-9a-f-]{36})$/, job, "Job"],
  [/^\/(?<kind>models|agents)$/, artifacts, null],
  [/^\/(?<kind>models|agents)\/(?<name>[^/]+)$/, artifact, null],
  [/^\/compare\/(?<kind>models|agents)$/, compare, "Comparison"],
  [/^\/resources$/, resources, "Resources"],
  [/^\/alerts$/, alerts, "Alerts"],
];

const main = document.getElementById("main");
let shown = null;

/** The newest board, and who wants to know of it. */
const board = { now: null, listeners: new Set() };

/** Call a function with the board, now and whenever it changes, until the signal. */
function onBoard(listener, signal) {
  board.listeners.add(listener);
  signal.addEventListener("abort", () => board.listeners.delete(listener));
  if (board.now) listener(board.now);
}

async function show(focus) {
  shown?.abort();
  const page = (shown = new AbortController());
  const { pathname, search } = location;
  const route = ROUTES.map(([pattern, module, title]) => ({ match: pattern.exec(pathname), module, title })).find((one) => one.match);
  for (const link of document.querySelectorAll("#nav a")) {
    const path = link.getAttribute("href");
    const current = path === "/" ? pathname === "/" : pathname.startsWith(path) || pathname.startsWith(`/compare${path}`);
    if (current) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const setTitle = (text) => (document.title = `${text} · forge`);
  const parameters = Object.fromEntries(
    Object.entries(route?.match.groups ?? {}).map(([name, value]) => [name, decoded(value)]),
  );
  const context = { main, signal: page.signal, onBoard, setTitle, parameters, query: new URLSearchParams(search), go };
  window.scrollTo(0, 0);
  try {
    if (!route) throw new Refused(404, { message: "There is no such page." });
    setTitle(route.title ?? parameters.name ?? parameters.kind.replace(/^./, (letter) => letter.toUpperCase()));
    await route.module.render(context);
  } catch (error) {
    if (!page.signal.aborted) tell(error, context);
  }
  if (focus && !page.signal.aborted) main.focus({ preventScroll: true });
}

/** A part of a path as it was meant; one that is no encoding of anything stands for itself. */
function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function tell(error, context) {
  const away = error instanceof Refused && error.status === 503;
  fill(
    main,
    h("h1", {}, error.status === 404 ? "Not found" : away ? "Away" : "This could not be shown"),
    h("p", { class: "notice bad" }, error.reason ? `${error.reason}: ` : "", error.message),
    away ? h("p", { class: "muted" }, "The page comes back by itself when the service does.") : null,
  );
  if (!(error instanceof Refused)) console.error(error);
  if (!away) return;
  let answered = false;
  context.onBoard((seen) => {
    // The board that was there when the call failed may be older than the failure.
    if (answered && seen.services.every((service) => service.health !== "AWAY")) void show(false);
    answered = true;
  }, context.signal);
}

function go(path) {
  history.pushState(null, "", path);
  void show(true);
}

document.addEventListener("click", (event) => {
  const link = event.target.closest?.("a[href]");
  if (!link || event.defaultPrevented || event.button || event.metaKey || event.ctrlKey || event.shiftKey) return;
  const href = link.getAttribute("href");
  if (!href.startsWith("/") || href.startsWith("/static/")) return;
  event.preventDefault();
  go(href);
});
window.addEventListener("popstate", () => void show(true));

// --- theme

const THEMES = ["system", "light", "dark"];
const button = document.getElementById("theme");

function theme() {
  return document.documentElement.dataset.choice ?? "system";
}

function setTheme(chosen) {
  if (chosen === "system") delete document.documentElement.dataset.choice;
  else document.documentElement.dataset.choice = chosen;
  try {
    localStorage.setItem("forge-theme", chosen);
  } catch {
    // It holds for this page then.
  }
  button.textContent = `Theme: ${chosen}`;
  window.dispatchEvent(new Event("forge-theme"));
}

button.textContent = `Theme: ${theme()}`;
button.addEventListener("click", () => setTheme(THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length]));

// --- the board

const NAMES = { cognate: "Cognate pretraining", agent: "Agent training" };
const live = document.getElementById("live");
let told = "";

function onState(state) {
  live.dataset.state = state;
  const text = state === "live" ? "live" : "the dashboard's process does not answer";
  if (live.querySelector(".text").textContent !== text) live.querySelector(".text").textContent = text;
}

function onSeen(seen) {
  board.now = seen;
  const away = seen.services.filter((service) => service.health === "AWAY");
  const count = document.getElementById("alert-count");
  const alerts = seen.alerts?.length ?? 0;
  count.hidden = !alerts;
  count.textContent = alerts;
  count.setAttribute("aria-label", `, ${alerts} active`);
  // Told once, or a screen reader would hear it with every look.
  const words = away.map((service) => `${service.service} ${service.away_since}`).join();
  if (words !== told) {
    told = words;
    fill(
      document.getElementById("notices"),
      away.map((service) =>
        h(
          "p",
          { class: "notice bad" },
          h("strong", {}, NAMES[service.service]),
          " is away since ",
          time(service.away_since),
          `: ${service.error.message}. This page goes on when it is back.`,
        ),
      ),
    );
  }
  for (const listener of board.listeners) listener(seen);
}

follow(() => "/api/board", { board: onSeen }, { signal: new AbortController().signal, onState });
void about();
void show(false);

