"use strict";
/* Filter, order and zoom of the report's pictures. Without scripts all of them are there, worst
   first. Texts reach the page as text only. */
(() => {
  const byId = (id) => document.getElementById(id);
  const list = byId("prompt-list");
  const cards = Array.from(list.children);
  const rows = Array.from(document.querySelectorAll("tr[data-text]"));
  const boxes = Array.from(document.querySelectorAll("input[name=column]"));
  const filter = byId("filter"), order = byId("order"), category = byId("category");
  for (const part of document.querySelectorAll("[data-scripted]")) part.hidden = false;

  const isWanted = (item) =>
    item.dataset.text.toLowerCase().includes(filter.value.trim().toLowerCase()) &&
    (!category || category.value === "*" || item.dataset.category === category.value);
  const shown = () => Array.from(list.children).filter((card) => !card.hidden);

  const update = () => {
    for (const item of [...cards, ...rows]) item.hidden = !isWanted(item);
    const of = (items) => `${items.filter((item) => !item.hidden).length} of ${items.length}`;
    byId("count").textContent = `${of(cards)} prompts with pictures, ${of(rows)} in all`;
  };
  const sort = () => {
    const number = (card, key) => Number(card.dataset[key]);
    const compare = {
      worst: (a, b) => number(a, "rank") - number(b, "rank"),
      best: (a, b) => number(b, "rank") - number(a, "rank"),
      file: (a, b) => number(a, "number") - number(b, "number"),
    }[order.value];
    list.append(...cards.sort(compare));
  };
  const chooseColumns = () => {
    for (const box of boxes)
      for (const item of list.querySelectorAll(`[data-column="${CSS.escape(box.value)}"]`))
        item.hidden = !box.checked;
  };
  filter.addEventListener("input", update);
  if (category) category.addEventListener("change", update);
  order.addEventListener("change", sort);
  for (const box of boxes) box.addEventListener("change", chooseColumns);
  chooseColumns();
  update();

  /* One view for all panes: scale, and where the picture's left upper corner is, in shares of a
     pane's side. */
  const dialog = byId("zoom"), panes = byId("panes"), most = 32;
  let view = { scale: 1, x: 0, y: 0 }, card = null, column = null;
  const within = (value, scale) => Math.min(0, Math.max(1 - scale, value));
  const apply = () => {
    view.x = within(view.x, view.scale);
    view.y = within(view.y, view.scale);
    for (const image of panes.querySelectorAll("img"))
      image.style.transform =
        `translate(${100 * view.x}%, ${100 * view.y}%) scale(${view.scale})`;
    byId("scale").textContent = `${Math.round(100 * view.scale)} %`;
  };
  const zoom = (factor, atX = 0.5, atY = 0.5) => {
    const scale = Math.min(most, Math.max(1, view.scale * factor));
    const share = scale / view.scale;
    view = { scale, x: atX - (atX - view.x) * share, y: atY - (atY - view.y) * share };
    apply();
  };
  const move = (x, y) => {
    view = { ...view, x: view.x + x, y: view.y + y };
    apply();
  };
  const reset = () => {
    view = { scale: 1, x: 0, y: 0 };
    apply();
  };
  const show = (next) => {
    card = next;
    byId("zoom-title").textContent = card.querySelector("h3").textContent;
    const made = Array.from(card.querySelectorAll("figure:not([hidden])"), (figure) => {
      const pane = document.createElement("figure");
      const frame = document.createElement("div");
      const image = document.createElement("img");
      const caption = document.createElement("figcaption");
      const source = figure.querySelector("img");
      image.src = source.src;
      image.alt = source.alt;
      image.className = source.className;
      image.draggable = false;
      frame.className = "frame";
      frame.append(image);
      caption.textContent = figure.dataset.method;
      pane.append(frame, caption);
      return pane;
    });
    panes.replaceChildren(...made);
    apply();
  };
  const step = (by) => {
    const all = shown();
    show(all[(all.indexOf(card) + by + all.length) % all.length]);
  };

  list.addEventListener("click", (event) => {
    const button = event.target.closest("button.picture");
    if (!button) return;
    column = button.closest("figure").dataset.column;
    reset();
    show(button.closest("article"));
    dialog.showModal();
  });
  dialog.addEventListener("close", () => {
    const back = card.querySelector(`figure[data-column="${CSS.escape(column)}"] button`);
    if (back) back.focus();
  });
  const actions = {
    "zoom-in": () => zoom(1.5),
    "zoom-out": () => zoom(1 / 1.5),
    "zoom-reset": reset,
    "zoom-previous": () => step(-1),
    "zoom-next": () => step(1),
    "zoom-close": () => dialog.close(),
  };
  for (const [id, action] of Object.entries(actions)) byId(id).addEventListener("click", action);
  const keys = {
    "+": actions["zoom-in"], "=": actions["zoom-in"], "-": actions["zoom-out"], 0: reset,
    ArrowLeft: () => move(0.1, 0), ArrowRight: () => move(-0.1, 0),
    ArrowUp: () => move(0, 0.1), ArrowDown: () => move(0, -0.1),
    n: actions["zoom-next"], p: actions["zoom-previous"],
  };
  dialog.addEventListener("keydown", (event) => {
    const action = event.ctrlKey || event.metaKey || event.altKey ? null : keys[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });

  const place = (event) => {
    const frame = event.target.closest(".frame");
    if (!frame) return null;
    const box = frame.getBoundingClientRect();
    return {
      x: (event.clientX - box.left) / box.width,
      y: (event.clientY - box.top) / box.height,
      width: box.width,
      height: box.height,
    };
  };
  panes.addEventListener("wheel", (event) => {
    const at = place(event);
    if (!at) return;
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 400), at.x, at.y);
  }, { passive: false });
  panes.addEventListener("dblclick", (event) => {
    const at = place(event);
    if (at) zoom(2, at.x, at.y);
  });
  let held = null;
  panes.addEventListener("pointerdown", (event) => {
    const at = place(event);
    if (!at) return;
    held = { x: event.clientX, y: event.clientY, width: at.width, height: at.height };
    panes.setPointerCapture(event.pointerId);
  });
  panes.addEventListener("pointermove", (event) => {
    if (!held) return;
    move((event.clientX - held.x) / held.width, (event.clientY - held.y) / held.height);
    held = { ...held, x: event.clientX, y: event.clientY };
  });
  for (const name of ["pointerup", "pointercancel"])
    panes.addEventListener(name, () => { held = null; });
})();
