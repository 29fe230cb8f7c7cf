/* Tables sort: by a click on a heading, or by #sort=TABLE:COLUMN:asc after the address. Pictures
   grow: by a click or Enter, until the next click or Esc; the arrow keys go to their neighbours. */
const cellOf = (heading, row) => row?.cells[heading.cellIndex];
const rowsOf = heading => [...heading.closest('table').tBodies[0].rows];
function value(cell) {
  if (cell.dataset.v === undefined) return cell.textContent.trim();
  return cell.dataset.v === '' ? NaN : +cell.dataset.v;
}
function sort(heading, down) {
  const compare = (a, b) => typeof a === 'string' ? a.localeCompare(b) : a - b;
  const order = (a, b) => Number.isNaN(a) - Number.isNaN(b) || compare(a, b) * (down ? -1 : 1) || 0;
  rowsOf(heading)
    .sort((a, b) => order(value(cellOf(heading, a)), value(cellOf(heading, b))))
    .forEach(row => row.parentNode.append(row));
  for (const other of heading.parentNode.cells) other.removeAttribute('aria-sort');
  heading.setAttribute('aria-sort', down ? 'descending' : 'ascending');
}
function follow() {
  const [, table, key, way] = /^#sort=(\w+):(\w+)(?::(asc|desc))?$/.exec(location.hash) || [];
  const heading = table && document.querySelector(`#${table} th[data-key="${key}"]`);
  if (heading) sort(heading, way !== 'asc');
  return heading;
}
const grown = () => document.querySelector('figure.grown');
const figures = () => [...document.querySelectorAll('.cells figure')];
function grow(figure) {
  const before = grown();
  before?.classList.remove('grown');
  if (figure && figure !== before) figure.classList.add('grown');
}
function step(by) {
  const all = figures(), next = all[all.indexOf(grown()) + by];
  if (grown() && next) grow(next);
}
addEventListener('click', event => {
  const figure = event.target.closest('.cells figure');
  if (figure || grown()) return grow(figure);
  const heading = event.target.closest('th[data-key]');
  if (!heading) return;
  const number = heading.cellIndex && cellOf(heading, rowsOf(heading)[0])?.dataset.v !== undefined;
  const sorted = heading.getAttribute('aria-sort');
  const down = sorted ? sorted !== 'descending' : number;
  location.hash = `sort=${heading.closest('table').id}:${heading.dataset.key}:${down ? 'desc' : 'asc'}`;
});
addEventListener('keydown', event => {
  if (event.key === 'Escape') grow(null);
  if (event.key === 'ArrowRight') step(1);
  if (event.key === 'ArrowLeft') step(-1);
  if (event.key === 'Enter' && event.target.matches('.cells img')) grow(event.target.parentNode);
});
addEventListener('hashchange', follow);
addEventListener('beforeprint', () => document.querySelectorAll('details').forEach(d => d.open = true));
follow()?.scrollIntoView({block: 'center'});
