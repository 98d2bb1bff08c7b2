//! What may happen thousands of times a second, and is worth a line in the log now and then.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

/// Pause between two lines.
const PAUSE: Duration = Duration::from_secs(5);

/// Counts what happens between two lines.
#[derive(Default)]
pub struct Seldom {
    last: Cell<Option<Instant>>,
    unsaid: Cell<u64>,
}

impl Seldom {
    /// It has happened: how often before that since the last line, if there is to be one.
    #[must_use]
    pub fn say(&self) -> Option<u64> {
        if self.last.get().is_some_and(|last| last.elapsed() < PAUSE) {
            self.unsaid.set(self.unsaid.get() + 1);
            return None;
        }
        self.last.set(Some(Instant::now()));
        Some(self.unsaid.take())
    }
}
