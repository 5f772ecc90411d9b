// Before the first paint, so that nothing flashes: a classic script, which the parser waits for.
// data-choice: "light" or "dark", absent for the system's. data-theme: which of the two is shown, for the style sheet.
(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const show = () => (root.dataset.theme = root.dataset.choice ?? (system.matches ? "dark" : "light"));
  let chosen = null;
  try {
    chosen = localStorage.getItem("forge-theme");
  } catch {
    // Storage may be switched off: the system's theme it is.
  }
  if (chosen === "light" || chosen === "dark") root.dataset.choice = chosen;
  show();
  addEventListener("forge-theme", show);
  system.addEventListener("change", () => dispatchEvent(new Event("forge-theme")));
})();
