use std::collections::BTreeMap;
use std::fs::{read_dir, read_to_string};
use std::path::Path;

/// Bytes of the last level of cache, all its parts together: what data must be larger than to be read from memory.
/// `None` where the system does not tell.
pub fn last_level_cache_bytes() -> Option<u64> {
    last_level_below(Path::new("/sys/devices/system/cpu"))
}

/// `root` has folders `cpuN/cache/indexM` with files `level`, `type`, `size` (`32768K`) and `shared_cpu_list`.
fn last_level_below(root: &Path) -> Option<u64> {
    let mut parts: BTreeMap<(u32, String), u64> = BTreeMap::new();
    for cpu in read_dir(root).ok()?.flatten() {
        let Ok(indices) = read_dir(cpu.path().join("cache")) else { continue };
        for index in indices.flatten() {
            let read = |name: &str| Some(read_to_string(index.path().join(name)).ok()?.trim().to_owned());
            let part = || {
                let kibibytes = read("size")?.strip_suffix('K')?.parse::<u64>().ok()?;
                Some(((read("level")?.parse().ok()?, read("shared_cpu_list")?), kibibytes.checked_mul(1024)?))
            };
            if read("type").is_some_and(|kind| kind != "Instruction") {
                parts.extend(part());
            }
        }
    }
    let last = parts.keys().map(|(level, _)| *level).max()?;
    parts.iter().filter(|((level, _), _)| *level == last).map(|(_, bytes)| *bytes).reduce(u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_the_last_level_are_counted_once_each() {
        let root = std::env::temp_dir().join(format!("kintsugi-runtime-{}-caches", std::process::id()));
        let write = |cpu: u32, index: u32, level: &str, kind: &str, size: &str, shared: &str| {
            let folder = root.join(format!("cpu{cpu}/cache/index{index}"));
            std::fs::create_dir_all(&folder).unwrap();
            for (name, text) in [("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared)] {
                std::fs::write(folder.join(name), format!("{text}\n")).unwrap();
            }
        };
        assert_eq!(last_level_below(&root), None);
        for cpu in 0..4 {
            write(cpu, 0, "1", "Data", "32K", &cpu.to_string());
            write(cpu, 1, "1", "Instruction", "999999K", &cpu.to_string());
            write(cpu, 3, "3", "Unified", "16384K", if cpu < 2 { "0-1" } else { "2-3" });
        }
        std::fs::create_dir_all(root.join("cpufreq")).unwrap();
        assert_eq!(last_level_below(&root), Some(2 * (16384 << 10)));
        write(3, 3, "3", "Unified", "much", "2-3");
        assert_eq!(last_level_below(&root), Some(2 * (16384 << 10)), "cpu2 has told the size");
        std::fs::remove_dir_all(&root).unwrap();
    }
}
