use std::fs::read_to_string;
use std::path::Path;

/// Largest resident set of this process so far in bytes, or `None` where the system does not tell.
pub fn peak_memory_bytes() -> Option<u64> {
    status_bytes("VmHWM")
}

/// Memory that belongs to this process alone now, in bytes: what it has allocated, without files that it has read
/// (`RssAnon + RssShmem`). `None` where the system does not tell.
pub fn private_memory_bytes() -> Option<u64> {
    Some(status_bytes("RssAnon")? + status_bytes("RssShmem")?)
}

/// Memory that this process may still take, in bytes: what the system has available, and what every control group
/// above the process allows. `None` where the system does not tell.
pub fn available_memory_bytes() -> Option<u64> {
    let meminfo = read_to_string("/proc/meminfo").ok()?;
    let system = kibibytes(&meminfo, "MemAvailable")?;
    let groups = read_to_string("/proc/self/cgroup").unwrap_or_default();
    Some(system.min(group_limits(&groups, Path::new("/sys/fs/cgroup")).unwrap_or(u64::MAX)))
}

fn status_bytes(field: &str) -> Option<u64> {
    kibibytes(&read_to_string("/proc/self/status").ok()?, field)
}

/// The value of a line `Field:   123 kB` in bytes.
fn kibibytes(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// The least that any of the control groups leaves. `groups` is `/proc/self/cgroup`: lines `id:controllers:path`, of
/// version 2 with id 0 and no controllers.
fn group_limits(groups: &str, root: &Path) -> Option<u64> {
    let mut least = None;
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (root, names) = match controllers {
            "" => (root.to_path_buf(), ["memory.max", "memory.current"]),
            _ if controllers.split(',').any(|name| name == "memory") => {
                (root.join("memory"), ["memory.limit_in_bytes", "memory.usage_in_bytes"])
            }
            _ => continue,
        };
        // In a container the path may be that outside of it; the root is then the group of the container.
        let folder = root.join(path.trim_start_matches('/'));
        for folder in folder.ancestors().take_while(|folder| folder.starts_with(&root)) {
            let number = |name: &str| read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
            let (Some(limit), Some(used)) = (number(names[0]), number(names[1])) else { continue };
            let left = limit.saturating_sub(used.saturating_sub(file_cache(folder)));
            least = Some(least.map_or(left, |least: u64| least.min(left)));
        }
    }
    least
}

/// Bytes of a group that are copies of files and leave memory when it is needed.
fn file_cache(folder: &Path) -> u64 {
    let text = read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let values = text.lines().filter_map(|line| line.split_once(' '));
    let cached = values.filter(|(name, _)| matches!(*name, "inactive_file" | "active_file"));
    cached.filter_map(|(_, value)| value.trim().parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_both_versions_of_control_groups_are_found_at_every_level() {
        let root = std::env::temp_dir().join(format!("kintsugi-runtime-{}-groups", std::process::id()));
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        assert_eq!(group_limits("0::/a/b\n", &root), None);
        write("a/b/memory.max", "max\n");
        write("a/b/memory.current", "5000\n");
        assert_eq!(group_limits("0::/a/b\n", &root), None, "no limit");
        write("a/memory.max", "10000\n");
        write("a/memory.current", "7000\n");
        write("a/memory.stat", "anon 9\ninactive_file 1500\nactive_file 500\n");
        assert_eq!(group_limits("0::/a/b\n", &root), Some(10000 - (7000 - 2000)));
        write("memory/c/memory.limit_in_bytes", "900\n");
        write("memory/c/memory.usage_in_bytes", "1000\n");
        assert_eq!(group_limits("5:cpu,memory:/c\n0::/a/b\n", &root), Some(0));
        std::fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn this_process_has_memory() {
        assert_eq!(kibibytes("VmHWM:\t  12 kB\n", "VmHWM"), Some(12288));
        assert_eq!(kibibytes("VmHWMX: 12 kB\n", "VmHWM"), None);
        if cfg!(target_os = "linux") {
            assert!(peak_memory_bytes().unwrap() >= private_memory_bytes().unwrap() / 2);
            assert!(available_memory_bytes().unwrap() > 0);
        }
    }
}
