import { type Output, colorsFor, visibleWidth } from './terminal.js'

const GAP = '  '

/** A column of a table. */
export interface Column {
  title: string
  /** Default `left`. */
  align?: 'left' | 'right'
}

/** A table as text: dim titles, a rule, the rows; cells may have colours. */
export function formatTable(columns: readonly Column[], rows: readonly (readonly string[])[], output: Output): string {
  const colors = colorsFor(output)
  const widths = columns.map(({ title }, index) =>
    Math.max(title.length, ...rows.map((row) => visibleWidth(row[index] ?? ''))),
  )
  const line = (cells: readonly string[]): string =>
    columns
      .map(({ align }, index) => pad(cells[index] ?? '', widths[index]!, align))
      .join(GAP)
      .trimEnd()
  const rule = '─'.repeat(widths.reduce((sum, width) => sum + width, GAP.length * (columns.length - 1)))
  return [colors.dim(line(columns.map(({ title }) => title))), colors.dim(rule), ...rows.map(line)].join('\n')
}

/** Names and values below each other; pairs without a value are left out. */
export function formatPairs(pairs: readonly (readonly [string, string | undefined])[], output: Output): string {
  const colors = colorsFor(output)
  const given = pairs.filter(([, value]) => value !== undefined)
  const width = Math.max(...given.map(([name]) => name.length))
  return given.map(([name, value]) => `${colors.dim(name.padEnd(width))}${GAP}${value}`).join('\n')
}

function pad(text: string, width: number, align: Column['align']): string {
  const space = ' '.repeat(width - visibleWidth(text))
  return align === 'right' ? space + text : text + space
}
