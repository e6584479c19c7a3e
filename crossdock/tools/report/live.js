// Asks for the page again every few seconds, and puts what is new in the place of what is shown.
"use strict";
(() => {
  const status = document.querySelector("#live");
  const seconds = Number(status.dataset.seconds);
  let tag = status.dataset.tag;

  const nameOf = (element) => element.id || (element.matches("summary") ? element.textContent : "");
  // What somebody has opened, chosen and focused, by what it is called.
  const remember = () => ({
    open: [...document.querySelectorAll("main details[open] > summary")].map((summary) => summary.textContent),
    sliders: [...document.querySelectorAll("main .slider input")].map(({ id, value, max }) => ({ id, value, atEnd: value === max })),
    focus: document.activeElement?.closest("main") ? nameOf(document.activeElement) : "",
  });
  const restore = ({ open, sliders, focus }) => {
    for (const summary of document.querySelectorAll("main details > summary")) {
      summary.parentElement.open = open.includes(summary.textContent);
    }
    for (const { id, value, atEnd } of sliders) {
      const slider = document.getElementById(id);
      if (!slider || atEnd) continue; // One that shows the last records goes on doing so.
      slider.value = value;
      slider.dispatchEvent(new Event("input"));
    }
    const focused = [...document.querySelectorAll("main [id], main summary")].find((element) => nameOf(element) === focus);
    if (focus) focused?.focus({ preventScroll: true });
  };

  const look = async () => {
    try {
      const answer = await fetch("/", { headers: { "If-None-Match": tag }, cache: "no-store" });
      if (answer.status === 200) {
        const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
        const kept = remember();
        document.title = fresh.title;
        document.querySelector("main").replaceWith(fresh.querySelector("main"));
        tag = answer.headers.get("ETag");
        bind();
        restore(kept);
      }
      status.textContent = `live, looked at ${new Date().toLocaleTimeString()}`;
      status.classList.remove("lost");
    } catch {
      status.textContent = "the server does not answer: this is the last that it said";
      status.classList.add("lost");
    }
    setTimeout(look, 1000 * seconds);
  };
  setTimeout(look, 1000 * seconds);
})();
