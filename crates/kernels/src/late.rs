use std::sync::OnceLock;

/// Looks at a value before a thread goes to sleep: some tens of microseconds.
const SPINS: usize = 2000;

/// A value that one task of a call makes and later tasks of the same call wait for. Tasks are begun in their order: whoever
/// waits knows that the maker runs, or is held up by the system, which holds up those that wait, too.
pub(crate) struct Late<T>(OnceLock<Option<T>>);

impl<T> Late<T> {
    /// To be made.
    pub(crate) const fn pending() -> Self {
        Late(OnceLock::new())
    }

    /// There from the start.
    pub(crate) fn ready(value: T) -> Self {
        Late(OnceLock::from(Some(value)))
    }

    /// Hands the value over, once.
    pub(crate) fn set(&self, value: T) {
        let _ = self.0.set(Some(value));
    }

    /// Says that the value will never come, where it has not: its maker panicked.
    pub(crate) fn abandon(&self) {
        let _ = self.0.set(None);
    }

    /// The value, as soon as it is there.
    ///
    /// # Panics
    /// When it was abandoned.
    pub(crate) fn wait(&self) -> &T {
        for _ in 0..SPINS {
            if self.0.get().is_some() {
                break;
            }
            std::hint::spin_loop();
        }
        self.0.wait().as_ref().expect("the task that makes the value has panicked")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_waited_for_and_an_abandoned_one_panics() {
        let (ready, late, abandoned) = (Late::ready(1), Late::pending(), Late::<i32>::pending());
        assert_eq!(ready.wait(), &1);
        std::thread::scope(|scope| {
            let waiters: Vec<_> = (0..3).map(|_| scope.spawn(|| *late.wait())).collect();
            let stranded = scope.spawn(|| *abandoned.wait());
            std::thread::sleep(std::time::Duration::from_millis(20));
            late.set(7);
            late.abandon();
            abandoned.abandon();
            for waiter in waiters {
                assert_eq!(waiter.join().unwrap(), 7);
            }
            assert!(stranded.join().is_err());
        });
    }
}
