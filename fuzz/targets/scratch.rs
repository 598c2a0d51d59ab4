//! A folder of this process in memory, for readers that take paths.

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let memory = PathBuf::from("/dev/shm");
    let parent = if memory.is_dir() { memory } else { std::env::temp_dir() };
    let folder = parent.join(format!("kintsugi-fuzz-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder for the inputs");
    folder
});

/// Writes an input, and gives the path of its folder.
pub fn put(name: &str, bytes: &[u8]) -> PathBuf {
    fs::write(FOLDER.join(name), bytes).expect("the input is written");
    FOLDER.clone()
}
