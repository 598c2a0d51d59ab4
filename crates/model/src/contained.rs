use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

thread_local! {
    /// Whether a panic of this thread is somebody's who is called by [`contained`].
    static CONTAINED: Cell<bool> = const { Cell::new(false) };
}

/// Runs code of others that panics where it should give an error, and says nothing when it does.
///
/// # Errors
/// What the panic said.
pub(crate) fn contained<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !CONTAINED.get() {
                usual(info);
            }
        }));
    });
    let before = CONTAINED.replace(true);
    let result = panic::catch_unwind(AssertUnwindSafe(work));
    CONTAINED.set(before);
    result.map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message").to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error() {
        assert_eq!(contained(|| 7), Ok(7));
        let nothing: &[u8] = &[];
        let place = nothing.len();
        assert!(contained(|| nothing[place]).unwrap_err().contains("out of bounds"));
        assert!(!CONTAINED.get());
    }
}
