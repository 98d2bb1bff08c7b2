//! Memory that is free goes back to the kernel by a thread of its own.
//!
//! The allocator (mimalloc) gives back what has been free for a while from within some later allocation, all of it at
//! once: a shard that deletes a partition stood still for 25 ms when 300 MiB became free.

use std::{io, thread, time::Duration};

/// How often memory is given back: the allocator's own delay.
const EVERY: Duration = Duration::from_secs(1);
/// What the allocator waits for instead, ms: only where that thread does not run at all does it give back by itself.
const ALLOCATORS_DELAY_MS: std::ffi::c_long = 60_000;
/// `mi_option_purge_delay` of `mi_option_e` in `mimalloc.h`, version 3; the binding has no name for it.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Starts the thread; to be called before any other is. A delay set in the environment (`MIMALLOC_PURGE_DELAY`) stays.
///
/// # Errors
/// What the system says if there can be no thread.
pub fn give_back_in_background() -> io::Result<()> {
    // SAFETY: no other thread uses the allocator's options; the value is one that it takes.
    unsafe { libmimalloc_sys::mi_option_set_default(PURGE_DELAY, ALLOCATORS_DELAY_MS) };
    thread::Builder::new().name("memory".into()).spawn(|| {
        loop {
            thread::sleep(EVERY);
            // SAFETY: any thread may call it at any time.
            unsafe { libmimalloc_sys::mi_collect(true) };
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_option_is_the_one_that_is_meant() {
        // SAFETY: nothing here changes options.
        let delay = unsafe { libmimalloc_sys::mi_option_get(PURGE_DELAY) };
        assert_eq!(
            delay, 1_000,
            "the allocator's default; was its list of options changed?"
        );
    }
}
