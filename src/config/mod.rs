//! The configuration registry: one table behind the command line, environment, TOML file, documentation and
//! DescribeConfigs.
//!
//! Names are Kafka's where Kafka has one. A broker setting `num.partitions` is given as `--set num.partitions=8`, as
//! `MILLRACE_NUM_PARTITIONS=8`, or as `num.partitions = 8` in the file; the command line wins over the environment, the
//! environment over the file.

mod entries;
mod known;

use std::{collections::BTreeMap, path::Path};

use thiserror::Error;

pub use entries::{ENTRIES, Entry, Kind, Scope, find_broker, find_topic};
pub use known::Known;

/// A configuration that cannot be used; the text says what to do.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// Not in the registry.
    #[error("unknown setting {name:?}{}; `millrace settings` lists all", hint.as_ref().map(|h| format!(" (did you mean {h:?}?)")).unwrap_or_default())]
    Unknown {
        /// As given.
        name: String,
        /// A name like it.
        hint: Option<String>,
    },
    /// Outside its type or bounds.
    #[error("{reason}")]
    Invalid {
        /// Which and why.
        reason: String,
    },
    /// The file cannot be read or is not TOML.
    #[error("{path}: {reason}")]
    File {
        /// Which.
        path: String,
        /// Why.
        reason: String,
    },
}

/// Where a value came from; DescribeConfigs says so.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// The registry.
    Default,
    /// File, environment or command line.
    Static,
}

/// Broker settings in force.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    set: BTreeMap<&'static str, String>,
    /// Defaults that depend on the host.
    adapted: BTreeMap<&'static str, String>,
}

impl Settings {
    /// Sets one.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), ConfigError> {
        let entry = find_broker(name).ok_or_else(|| ConfigError::Unknown {
            name: name.into(),
            hint: closest(name),
        })?;
        let value = entry.read(value).map_err(|reason| ConfigError::Invalid { reason })?;
        self.set.insert(entry.name, value);
        Ok(())
    }

    /// Gives a setting another default on this host.
    ///
    /// # Panics
    /// If the registry has no such broker setting: a bug of ours.
    pub fn adapt(&mut self, name: &str, value: String) {
        let entry = find_broker(name).unwrap_or_else(|| panic!("no setting {name}"));
        self.adapted.insert(entry.name, value);
    }

    /// Takes in a TOML file; tables are read as dotted names.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load_file(&mut self, path: &Path) -> Result<(), ConfigError> {
        let file = |reason: String| ConfigError::File {
            path: path.display().to_string(),
            reason,
        };
        let text = std::fs::read_to_string(path).map_err(|e| file(e.to_string()))?;
        let table: toml::Table = text.parse().map_err(|e: toml::de::Error| file(e.to_string()))?;
        let mut flat = Vec::new();
        flatten("", &table, &mut flat);
        for (name, value) in flat {
            self.set(&name, &value)?;
        }
        Ok(())
    }

    /// Takes in `MILLRACE_…` variables. Ones that name no setting are refused, like any other misspelling; those that Kubernetes
    /// gives every pod beside a Service named `millrace` are passed over.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load_environment(&mut self, variables: impl Iterator<Item = (String, String)>) -> Result<(), ConfigError> {
        for (variable, value) in variables {
            let Some(rest) = variable.strip_prefix("MILLRACE_") else {
                continue;
            };
            // Of the command itself.
            if rest == "LOG" || rest == "CONFIG" || rest.starts_with("TEST_") || is_of_a_service(rest) {
                continue;
            }
            self.set(&rest.to_ascii_lowercase().replace('_', "."), &value)?;
        }
        Ok(())
    }

    /// Value of a setting.
    ///
    /// # Panics
    /// If the registry has no such broker setting: a bug of ours.
    #[must_use]
    pub fn get(&self, name: &str) -> &str {
        (self.set.get(name)).map_or_else(|| self.default_of(name), String::as_str)
    }

    /// Its value if nobody says another.
    ///
    /// # Panics
    /// If the registry has no such broker setting: a bug of ours.
    #[must_use]
    pub fn default_of(&self, name: &str) -> &str {
        let of_registry = || find_broker(name).unwrap_or_else(|| panic!("no setting {name}")).default;
        (self.adapted.get(name)).map_or_else(of_registry, String::as_str)
    }

    /// Where it comes from.
    #[must_use]
    pub fn source(&self, name: &str) -> Source {
        if self.set.contains_key(name) {
            Source::Static
        } else {
            Source::Default
        }
    }

    /// A numeric setting.
    ///
    /// # Panics
    /// If it is not numeric: values are checked when set.
    #[must_use]
    pub fn number(&self, name: &str) -> i64 {
        self.get(name)
            .parse()
            .unwrap_or_else(|_| panic!("{name} was checked when set"))
    }

    /// A yes-or-no setting.
    #[must_use]
    pub fn flag(&self, name: &str) -> bool {
        self.get(name) == "true"
    }

    /// The default that a topic setting has on this broker, and where it comes from.
    #[must_use]
    pub fn topic_default(&self, entry: &Entry) -> (&str, Source) {
        match entry.scope {
            Scope::Topic { broker } if !broker.is_empty() => (self.get(broker), self.source(broker)),
            _ => (find_topic(entry.name).map_or("", |e| e.default), Source::Default),
        }
    }
}

/// Whether Kubernetes makes a variable of this name, behind the prefix, for a Service named like this program: `SERVICE_HOST`,
/// `SERVICE_PORT`, `SERVICE_PORT_NAME`, `PORT`, `PORT_9092_TCP`, `PORT_9092_TCP_ADDR` (kubernetes.io, "Environment variables" of
/// Services).
fn is_of_a_service(rest: &str) -> bool {
    if matches!(rest, "SERVICE_HOST" | "SERVICE_PORT" | "PORT") || rest.starts_with("SERVICE_PORT_") {
        return true;
    }
    let mut parts = rest.split('_');
    parts.next() == Some("PORT")
        && parts.next().is_some_and(|p| p.parse::<u16>().is_ok())
        && matches!(parts.next(), Some("TCP" | "UDP" | "SCTP"))
        && matches!(parts.next(), None | Some("PROTO" | "PORT" | "ADDR"))
        && parts.next().is_none()
}

fn flatten(prefix: &str, table: &toml::Table, out: &mut Vec<(String, String)>) {
    for (key, value) in table {
        let name = if prefix.is_empty() {
            key.clone()
        } else {
            format!("{prefix}.{key}")
        };
        match value {
            toml::Value::Table(inner) => flatten(&name, inner, out),
            toml::Value::String(s) => out.push((name, s.clone())),
            other => out.push((name, other.to_string())),
        }
    }
}

fn closest(name: &str) -> Option<String> {
    let tail = name.rsplit('.').next().unwrap_or(name);
    ENTRIES
        .iter()
        .filter(|e| matches!(e.scope, Scope::Broker { .. }))
        .map(|e| e.name)
        .find(|n| n.contains(tail) || n.replace(['.', '_', '-'], "") == name.replace(['.', '_', '-'], ""))
        .map(str::to_owned)
}

/// Bytes of a size like `64MiB`, `1G`, `1048576`.
///
/// # Errors
/// A text that says what is allowed.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = text[digits.len()..].to_ascii_lowercase();
    let scale = match unit.trim_end_matches("ib").trim_end_matches('b') {
        "" => 1,
        "k" => 1 << 10,
        "m" => 1 << 20,
        "g" => 1 << 30,
        "t" => 1_u64 << 40,
        _ => return Err(format!("{text:?} is not a size; write for example 512MiB or 2GiB")),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(scale))
        .ok_or_else(|| format!("{text:?} is not a size; write for example 512MiB or 2GiB"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_from_file_environment_and_command_line() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let file = dir.path().join("millrace.toml");
        std::fs::write(
            &file,
            "num.partitions = 3\n[group]\nmax.size = 7\n[log]\nretention.ms = 5\n",
        )
        .expect("written");
        let mut settings = Settings::default();
        settings.load_file(&file).expect("valid");
        settings
            .load_environment(
                [
                    ("MILLRACE_NUM_PARTITIONS".into(), "4".into()),
                    ("PATH".into(), "x".into()),
                ]
                .into_iter(),
            )
            .expect("valid");
        assert_eq!(settings.number("num.partitions"), 4);
        settings.set("num.partitions", "5").expect("valid");
        assert_eq!(settings.number("num.partitions"), 5);
        assert_eq!(settings.number("group.max.size"), 7);
        assert_eq!(settings.source("log.retention.ms"), Source::Static);
        assert!(matches!(
            settings.set("num.partitons", "1"),
            Err(ConfigError::Unknown { .. })
        ));
        assert!(matches!(
            settings.set("num.partitions", "0"),
            Err(ConfigError::Invalid { .. })
        ));
    }

    #[test]
    fn variables_of_a_kubernetes_service_are_no_settings() {
        let load = |name: &str| {
            let variable = (name.to_owned(), "tcp://10.0.0.1:9092".to_owned());
            Settings::default().load_environment([variable].into_iter())
        };
        for name in [
            "MILLRACE_SERVICE_HOST",
            "MILLRACE_SERVICE_PORT",
            "MILLRACE_SERVICE_PORT_KAFKA",
            "MILLRACE_PORT",
            "MILLRACE_PORT_9092_TCP",
            "MILLRACE_PORT_9192_UDP_PROTO",
            "MILLRACE_PORT_9092_TCP_PORT",
            "MILLRACE_PORT_9092_TCP_ADDR",
        ] {
            load(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        for name in [
            "MILLRACE_PORTS",
            "MILLRACE_PORT_X_TCP",
            "MILLRACE_PORT_9092_TCP_ADR",
            "MILLRACE_SERVICE",
        ] {
            assert!(matches!(load(name), Err(ConfigError::Unknown { .. })), "{name}");
        }
    }

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [
            ("1048576", 1 << 20),
            ("64MiB", 64 << 20),
            ("2g", 2 << 30),
            ("1KB", 1024),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "x", "1.5g", "-1", "99999999999g"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
