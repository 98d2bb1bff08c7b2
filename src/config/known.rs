//! What the controller is told of settings: which values a topic or a broker may be given while it runs.

use millrace_cluster::controller::{ControllerError, configs::Registry};

use super::entries::{Scope, find_broker, find_topic};

/// The registry as the controller sees it.
#[derive(Clone, Copy, Debug)]
pub struct Known;

impl Registry for Known {
    fn read_topic(&self, name: &str, value: &str) -> Result<String, ControllerError> {
        let invalid = |reason: String| ControllerError::InvalidConfig { reason };
        let entry = find_topic(name).ok_or_else(|| invalid(format!("Unknown topic config name: {name}")))?;
        entry.read(value).map_err(invalid)
    }

    fn read_broker(&self, name: &str, value: &str) -> Result<String, ControllerError> {
        let invalid = |reason: String| ControllerError::InvalidConfig { reason };
        let entry = find_broker(name).ok_or_else(|| invalid(format!("Unknown broker config name: {name}")))?;
        if !matches!(entry.scope, Scope::Broker { dynamic: true }) {
            return Err(invalid(format!(
                "{name} cannot be changed while the broker runs: restart it with --set {name}={value}"
            )));
        }
        entry.read(value).map_err(invalid)
    }

    fn topic_list_default(&self, name: &str) -> Option<String> {
        find_topic(name)
            .filter(|e| e.kind.is_list())
            .map(|e| e.default.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_change_durability_or_retention_is_refused() {
        for (name, value) in [
            ("cleanup.policy", "compact"),
            ("cleanup.policy", "compact,delete"),
            ("remote.storage.enable", "true"),
            ("no.such", "1"),
            ("retention.ms", "x"),
        ] {
            assert!(Known.read_topic(name, value).is_err(), "{name}={value}");
        }
        for (name, value) in [
            ("retention.ms", "-1"),
            ("segment.jitter.ms", "5"),
            ("compression.type", "zstd"),
        ] {
            assert!(Known.read_topic(name, value).is_ok(), "{name}={value}");
        }
    }
}
