const BYTE_UNITS = ['B', 'kB', 'MB', 'GB', 'TB']
const COUNT_UNITS = ['', ' thousand', ' million', ' billion', ' trillion']

/** `14.7 MB`: decimal units, three digits. */
export function formatBytes(bytes: number): string {
  return scaled(
    bytes,
    BYTE_UNITS.map((unit) => ` ${unit}`),
  )
}

/** `7.34 million`. */
export function formatCount(count: number): string {
  return scaled(count, COUNT_UNITS)
}

/** `0.4 s`, `12 s`, `3 min 05 s`, `2 h 10 min`. */
export function formatSeconds(seconds: number): string {
  if (seconds < 10) return `${seconds.toFixed(1)} s`
  const whole = Math.round(seconds)
  if (whole < 60) return `${whole} s`
  const minutes = Math.floor(whole / 60)
  if (minutes < 60) return `${minutes} min ${twoDigits(whole % 60)} s`
  return `${Math.floor(minutes / 60)} h ${twoDigits(minutes % 60)} min`
}

/** `5.2 %` of a share. */
export function formatShare(share: number): string {
  return `${(share * 100).toFixed(1)} %`
}

function scaled(value: number, units: readonly string[]): string {
  let index = 0
  while (value >= 999.5 && index < units.length - 1) {
    value /= 1000
    index++
  }
  const digits = index === 0 || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2
  return value.toFixed(digits) + units[index]!
}

function twoDigits(value: number): string {
  return String(value).padStart(2, '0')
}
