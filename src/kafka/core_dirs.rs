//! Each core of a broker is a log directory of its own to tools; all are in the one data folder.

use std::path::Path;

/// What tools are told as the log directory of a core; the data folder itself where there is only one.
#[must_use]
pub fn core_dir(data: &Path, core: usize, cores: usize) -> String {
    match cores {
        1 => data.display().to_string(),
        _ => format!("{}#core-{core}", data.display()),
    }
}
