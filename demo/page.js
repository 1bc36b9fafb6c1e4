// Behavior that Gradio's components lack: descriptions of images, marks on word chips, arrow keys between chips, and
// results that are dragged onto a subject. Gradio creates elements at any time, so an observer refreshes them.
(() => {
  const ARROWS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };

  // Only changes are written, because each write calls the observer.
  function setAttribute(element, name, value) {
    if (element && element.getAttribute(name) !== value) element.setAttribute(name, value);
  }

  function describeImages() {
    for (const status of document.querySelectorAll("[data-description]")) {
      const tab = status.closest("[id$='-status']").id.replace("-status", "");
      const { description, masks } = status.dataset;
      setAttribute(document.querySelector(`#${tab}-live img`), "alt", description);
      setAttribute(document.querySelector(`#${tab}-masks img`), "alt", masks);
    }
    for (const slot of document.querySelectorAll(".subject-image")) {
      const words = document.getElementById(slot.id.replace("-image-", "-words-"));
      const phrase = document.querySelector(`#${slot.id.replace("-image-", "-phrase-")} :is(input, textarea)`);
      const selected = [...(words?.querySelectorAll("label.selected") ?? [])].map((label) => label.innerText.trim());
      const names = phrase?.value.trim() || selected.join(" and ");
      setAttribute(slot.querySelector("img"), "alt", `Reference image of ${names || "the subject"}`);
    }
  }

  function markWords() {
    for (const group of document.querySelectorAll("[id*='-words-'].words")) {
      const note = document.querySelector(`#${group.id.split("-words-")[0]}-prompt-note [data-marks]`);
      const { unknown = [], ignored = [] } = JSON.parse(note?.dataset.marks ?? "{}");
      for (const label of group.querySelectorAll("label")) {
        const word = label.innerText.trim();
        const mark = ignored.includes(word) ? "ignored" : unknown.includes(word) ? "unknown" : "";
        for (const kind of ["ignored", "unknown"]) {
          if (label.classList.contains(kind) !== (mark === kind)) label.classList.toggle(kind, mark === kind);
        }
        const reason = { ignored: ", beyond the token limit", unknown: ", unknown to this model" }[mark] ?? "";
        setAttribute(label.querySelector("input"), "title", word + reason);
      }
    }
  }

  // One chip of a group is in the tab order; arrow keys move between the others.
  function limitTabOrder(group) {
    const chips = [...group.querySelectorAll("input[type=checkbox]")];
    const current =
      chips.find((chip) => chip === document.activeElement) ??
      chips.find((chip) => chip.getAttribute("tabindex") === "0") ??
      chips.find((chip) => chip.checked) ??
      chips[0];
    for (const chip of chips) setAttribute(chip, "tabindex", chip === current ? "0" : "-1");
  }

  function refresh() {
    describeImages();
    markWords();
    document.querySelectorAll(".words").forEach(limitTabOrder);
  }

  document.addEventListener("focusin", (event) => {
    const group = event.target.closest(".words");
    if (group) limitTabOrder(group);
  });

  document.addEventListener("keydown", (event) => {
    const group = event.target.closest?.(".words");
    if (!group || event.target.type !== "checkbox" || !(event.key in ARROWS)) return;
    const chips = [...group.querySelectorAll("input[type=checkbox]")];
    const index = chips.indexOf(event.target) + ARROWS[event.key];
    chips[(index + chips.length) % chips.length].focus();
    event.preventDefault();
  });

  // Gradio accepts dropped files only. An image of this page arrives as its address, so it is fetched and dropped
  // again as a file.
  document.addEventListener(
    "drop",
    async (event) => {
      const { target, dataTransfer } = event;
      const address = dataTransfer?.getData("text/uri-list");
      if (!target.closest?.(".subject-image") || dataTransfer.files.length || !address) return;
      if (new URL(address).origin !== location.origin) return;
      event.preventDefault();
      event.stopPropagation();
      const blob = await (await fetch(address)).blob();
      const transfer = new DataTransfer();
      transfer.items.add(new File([blob], "result.png", { type: blob.type }));
      target.dispatchEvent(new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: transfer }));
    },
    true,
  );

  new MutationObserver(refresh).observe(document.documentElement, {
    subtree: true,
    childList: true,
    characterData: true,
    attributeFilter: ["class", "src", "data-description", "data-marks"],
  });
})();
