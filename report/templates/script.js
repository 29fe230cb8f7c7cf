/* Tables sort: by a click on a heading, or by #sort=TABLE:COLUMN:asc after the address. Pictures
   grow: by a click, Enter or Space, until the next one, Esc or Back; arrows go to their neighbours. */
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
const ways = document.createElement('div'); /* for fingers, who have no arrow keys */
ways.className = 'ways';
ways.innerHTML = [['previous', '‹'], ['close', '×'], ['next', '›']]
  .map(([name, sign]) => `<button type="button" aria-label="${name}">${sign}</button>`).join('');
function grow(figure) {
  const before = grown();
  before?.classList.remove('grown');
  ways.remove();
  if (!figure || figure === before) {
    if (history.state === 'grown') history.back();
    return before?.scrollIntoView({block: 'nearest'});
  }
  if (!before) history.pushState('grown', ''); /* for phones, whose Back then closes it */
  figure.classList.add('grown');
  figure.append(ways);
  figure.querySelector('img').focus({preventScroll: true});
}
function step(by) {
  const all = figures(), next = all[all.indexOf(grown()) + by];
  if (grown() && next) grow(next);
}
addEventListener('click', event => {
  const way = event.target.closest('.ways button')?.ariaLabel;
  if (way && way !== 'close') return step(way === 'next' ? 1 : -1);
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
  if ('Enter '.includes(event.key) && event.target.matches('.cells img')) {
    grow(event.target.parentNode);
    event.preventDefault();
  }
});
addEventListener('popstate', () => history.state !== 'grown' && grown() && grow(null));
addEventListener('hashchange', follow);
addEventListener('beforeprint', () => document.querySelectorAll('details').forEach(d => d.open = true));
follow()?.scrollIntoView({block: 'center'});
