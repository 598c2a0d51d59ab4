use std::path::Path;

/// Bytes that an ordinary user may still write where `path` is or will be. `None` where the system does not tell.
pub fn available_disk_bytes(path: &Path) -> Option<u64> {
    // What is not there yet will lie on the disk of its nearest folder.
    let absolute = std::path::absolute(path).ok()?;
    let folder = absolute.ancestors().find(|folder| folder.exists())?;
    free_bytes(folder)
}

#[cfg(unix)]
fn free_bytes(folder: &Path) -> Option<u64> {
    let state = rustix::fs::statvfs(folder).ok()?;
    state.f_bavail.checked_mul(state.f_frsize)
}

#[cfg(not(unix))]
fn free_bytes(_: &Path) -> Option<u64> {
    None
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_is_not_there_yet_has_the_space_of_its_parent() {
        let folder = std::env::temp_dir();
        let there = available_disk_bytes(&folder).unwrap();
        assert!(there > 0);
        let later = available_disk_bytes(&folder.join("not/there/yet")).unwrap();
        // Others write to the same disk meanwhile.
        assert!(later.abs_diff(there) < 1 << 30);
    }
}
