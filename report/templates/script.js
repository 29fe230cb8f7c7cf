/* Tables sort: by a click on a heading, or by #sort=TABLE:COLUMN:asc after the address. Pictures
   grow: by a click or Enter, until the next one or Esc. */
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
const grown = () => document.querySelector('img.grown');
function grow(picture) {
  const before = grown();
  before?.classList.remove('grown');
  if (picture && picture !== before) picture.classList.add('grown');
}
addEventListener('click', event => {
  const picture = event.target.closest('.cells img');
  if (picture || grown()) return grow(picture);
  const heading = event.target.closest('th[data-key]');
  if (!heading) return;
  const number = heading.cellIndex && cellOf(heading, rowsOf(heading)[0])?.dataset.v !== undefined;
  const sorted = heading.getAttribute('aria-sort');
  const down = sorted ? sorted !== 'descending' : number;
  location.hash = `sort=${heading.closest('table').id}:${heading.dataset.key}:${down ? 'desc' : 'asc'}`;
});
addEventListener('keydown', event => {
  if (event.key === 'Escape') grow(null);
  if (event.key === 'Enter' && event.target.matches('.cells img')) grow(event.target);
});
addEventListener('hashchange', follow);
addEventListener('beforeprint', () => document.querySelectorAll('details').forEach(d => d.open = true));
follow()?.scrollIntoView({block: 'center'});
