//! Configurations of topics and brokers.

use std::{collections::HashSet, fmt};

use super::{ControllerError, brokers, size};
use crate::metadata::{ConfigResource, Image, MetadataRecord};

/// What is known of configuration names; the node's one registry stands behind it.
pub trait Registry {
    /// A value as it is kept.
    ///
    /// # Errors
    /// [`ControllerError::InvalidConfig`] for a name or value that a topic cannot have.
    fn read_topic(&self, name: &str, value: &str) -> Result<String, ControllerError>;
    /// A value as it is kept.
    ///
    /// # Errors
    /// [`ControllerError::InvalidConfig`] for a name or value that cannot be changed on a running broker.
    fn read_broker(&self, name: &str, value: &str) -> Result<String, ControllerError>;
    /// The default of an entry that is a list; `None` if it is not one.
    fn topic_list_default(&self, name: &str) -> Option<String>;
}

/// One change of IncrementalAlterConfigs (KIP-339).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// Sets.
    Set,
    /// Back to the default.
    Delete,
    /// Adds to a list.
    Append,
    /// Takes from a list.
    Subtract,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Set => "SET",
            Self::Delete => "DELETE",
            Self::Append => "APPEND",
            Self::Subtract => "SUBTRACT",
        })
    }
}

fn check_resource(image: &Image, resource: &ConfigResource) -> Result<(), ControllerError> {
    match resource {
        ConfigResource::Topic(name) if image.topic(name).is_none() => Err(ControllerError::UnknownTopic),
        _ => Ok(()),
    }
}

fn read_value(
    registry: &dyn Registry,
    resource: &ConfigResource,
    name: &str,
    value: &str,
) -> Result<String, ControllerError> {
    size::check_value(name, value)?;
    match resource {
        ConfigResource::Topic(_) => registry.read_topic(name, value),
        ConfigResource::Broker(_) => registry.read_broker(name, value),
    }
}

/// The record of an entry; none takes back what is not there, whatever its name.
fn entry(image: &Image, resource: &ConfigResource, name: &str, value: Option<String>) -> Option<MetadataRecord> {
    let changes = value.is_some() || image.config(resource, name).is_some();
    changes.then(|| MetadataRecord::Config {
        resource: resource.clone(),
        name: name.into(),
        value,
    })
}

/// What follows from other settings of a topic for its partitions.
fn with_consequences(
    image: &Image,
    resource: &ConfigResource,
    mut records: Vec<MetadataRecord>,
) -> Vec<MetadataRecord> {
    let ConfigResource::Topic(name) = resource else {
        return records;
    };
    let after = image.apply(&records);
    records.extend(brokers::settle(&after, |topic| topic.name == *name));
    records
}

/// Refuses a request that names an entry twice, or gives none of the values it needs. Such a request was put together wrongly, whatever it
/// is about.
fn check_entries<'a>(
    names: impl Iterator<Item = &'a str>,
    without_value: impl Iterator<Item = &'a str>,
) -> Result<(), ControllerError> {
    let invalid = |reason: String| Err(ControllerError::InvalidRequest { reason });
    let mut seen = HashSet::new();
    for name in names {
        if !seen.insert(name) {
            return invalid(format!("Error due to duplicate config keys: {name}"));
        }
    }
    let without_value: Vec<&str> = without_value.collect();
    if without_value.is_empty() {
        return Ok(());
    }
    invalid(format!("Null value not supported for : {}", without_value.join(", ")))
}

/// Changes single entries.
///
/// # Errors
/// [`ControllerError`]; nothing of the resource is changed then.
pub fn alter_incrementally(
    image: &Image,
    registry: &dyn Registry,
    resource: &ConfigResource,
    changes: &[(String, Operation, Option<String>)],
) -> Result<Vec<MetadataRecord>, ControllerError> {
    let without_value = (changes.iter()).filter(|(_, op, value)| value.is_none() && *op != Operation::Delete);
    check_entries(
        changes.iter().map(|(name, ..)| name.as_str()),
        without_value.map(|(name, ..)| name.as_str()),
    )?;
    check_resource(image, resource)?;
    let mut records = Vec::new();
    for (name, operation, value) in changes {
        let given = value.as_deref().unwrap_or_default();
        let value = match operation {
            Operation::Delete => None,
            Operation::Set => Some(given.to_owned()),
            Operation::Append | Operation::Subtract => {
                let list_default = registry
                    .topic_list_default(name)
                    .ok_or_else(|| ControllerError::InvalidConfig {
                        reason: format!("Can't {operation} to key {name} because its type is not LIST."),
                    })?;
                let current = image.config(resource, name).unwrap_or(&list_default);
                let mut list: Vec<&str> = current.split(',').filter(|s| !s.is_empty()).collect();
                for item in given.split(',') {
                    match operation {
                        Operation::Append if !list.contains(&item) => list.push(item),
                        Operation::Subtract => list.retain(|have| *have != item),
                        _ => {}
                    }
                }
                Some(list.join(","))
            }
        };
        let value = value.map(|v| read_value(registry, resource, name, &v)).transpose()?;
        records.extend(entry(image, resource, name, value));
    }
    Ok(with_consequences(image, resource, records))
}

/// Replaces all entries of a resource (the older AlterConfigs).
///
/// # Errors
/// [`ControllerError`]; nothing of the resource is changed then.
pub fn replace(
    image: &Image,
    registry: &dyn Registry,
    resource: &ConfigResource,
    entries: &[(String, Option<String>)],
) -> Result<Vec<MetadataRecord>, ControllerError> {
    let without_value = entries.iter().filter(|(_, value)| value.is_none());
    check_entries(
        entries.iter().map(|(name, _)| name.as_str()),
        without_value.map(|(name, _)| name.as_str()),
    )?;
    check_resource(image, resource)?;
    let mut records: Vec<_> = image
        .configs(resource)
        .filter(|(name, _)| !entries.iter().any(|(n, _)| n == name))
        .map(|(name, _)| MetadataRecord::Config {
            resource: resource.clone(),
            name: name.into(),
            value: None,
        })
        .collect();
    for (name, value) in entries {
        let value = (value.as_ref())
            .map(|v| read_value(registry, resource, name, v))
            .transpose()?;
        records.extend(entry(image, resource, name, value));
    }
    Ok(with_consequences(image, resource, records))
}
