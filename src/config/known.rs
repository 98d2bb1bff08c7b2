//! What the controller is told of settings: which values a topic or a broker may be given while it runs.

use millrace_cluster::controller::{ControllerError, configs::Registry};

use super::entries::{Scope, find_broker, find_topic};

/// The registry as the controller sees it.
#[derive(Clone, Copy, Debug)]
pub struct Known;

impl Registry for Known {
    fn check_topic(&self, name: &str, value: &str) -> Result<(), ControllerError> {
        let invalid = |reason: String| ControllerError::InvalidConfig { reason };
        let Some(entry) = find_topic(name) else {
            return Err(invalid(if KAFKA_ONLY.contains(&name) {
                format!("{name} is not supported by Millrace yet")
            } else {
                format!("Unknown topic config name: {name}")
            }));
        };
        if name == "cleanup.policy" && value.contains("compact") {
            return Err(invalid(
                "cleanup.policy=compact is not supported yet: records would be kept that compaction should remove, \
                 or removed that it should keep. Use cleanup.policy=delete with retention.ms."
                    .into(),
            ));
        }
        entry.kind.check(name, value).map_err(invalid)
    }

    fn check_broker(&self, name: &str, value: &str) -> Result<(), ControllerError> {
        let invalid = |reason: String| ControllerError::InvalidConfig { reason };
        let entry = find_broker(name).ok_or_else(|| invalid(format!("Unknown broker config name: {name}")))?;
        if !matches!(entry.scope, Scope::Broker { dynamic: true }) {
            return Err(invalid(format!(
                "{name} cannot be changed while the broker runs: restart it with --set {name}={value}"
            )));
        }
        entry.kind.check(name, value).map_err(invalid)
    }

    fn topic_list_default(&self, name: &str) -> Option<String> {
        // `cleanup.policy` is a list in Kafka, with one value allowed here.
        (name == "cleanup.policy").then(|| "delete".to_owned())
    }
}

/// Topic settings of Kafka whose being ignored could change what is kept or seen.
const KAFKA_ONLY: &[&str] = &[
    "remote.storage.enable",
    "local.retention.ms",
    "local.retention.bytes",
    "remote.copy.disable",
    "remote.delete.on.disable",
];

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
            assert!(Known.check_topic(name, value).is_err(), "{name}={value}");
        }
        for (name, value) in [
            ("retention.ms", "-1"),
            ("segment.jitter.ms", "5"),
            ("compression.type", "zstd"),
        ] {
            assert!(Known.check_topic(name, value).is_ok(), "{name}={value}");
        }
    }
}
