//! DescribeConfigs, versions 1 to 4, of topics and brokers, from the one registry; synonyms and documentation on request.

use std::{collections::HashSet, rc::Rc};

use kafka_protocol::{
    messages::{
        DescribeConfigsRequest, DescribeConfigsResponse,
        describe_configs_request::DescribeConfigsResource,
        describe_configs_response::{DescribeConfigsResourceResult, DescribeConfigsResult, DescribeConfigsSynonym},
    },
    protocol::StrBytes,
};
use millrace_cluster::metadata::ConfigResource;

use crate::{
    config::Scope,
    kafka::{
        configs::{self, BROKER_LOGGER, Effective, SOURCE_DEFAULT},
        errors::Failure,
        repeats,
    },
    node::Node,
};

/// Handles a request.
#[must_use]
pub fn handle(node: &Rc<Node>, version: i16, request: &DescribeConfigsRequest) -> DescribeConfigsResponse {
    let mut resources: Vec<_> = request.resources.iter().collect();
    repeats::leave_out(&mut resources, |r| (r.resource_type, &r.resource_name));
    let results = resources
        .into_iter()
        .map(|resource| {
            let result = DescribeConfigsResult::default()
                .with_resource_type(resource.resource_type)
                .with_resource_name(resource.resource_name.clone());
            let keys = resource.configuration_keys.as_ref();
            let keys: Option<HashSet<&str>> = keys.map(|keys| keys.iter().map(|k| k.as_str()).collect());
            match entries(node, resource) {
                Ok(entries) => result.with_configs(
                    entries
                        .into_iter()
                        .filter(|e| keys.as_ref().is_none_or(|keys| keys.contains(e.entry.name)))
                        .map(|e| show(e, version, request))
                        .collect(),
                ),
                Err(failure) => result
                    .with_error_code(failure.code())
                    .with_error_message(failure.text()),
            }
        })
        .collect();
    DescribeConfigsResponse::default().with_results(results)
}

fn entries(node: &Node, resource: &DescribeConfigsResource) -> Result<Vec<Effective>, Failure> {
    let named = configs::resource(resource.resource_type, &resource.resource_name, node, false)?;
    let view = node.view();
    match &named {
        ConfigResource::Topic(name) => {
            view.image.topic(name).ok_or_else(Failure::unknown_partition)?;
            Ok(configs::topic_entries(&node.shared.settings, &view.image, &named))
        }
        ConfigResource::Broker(_) if resource.resource_type == BROKER_LOGGER => Ok(Vec::new()),
        // The cluster-wide defaults: only what was set there.
        ConfigResource::Broker(None) => Ok(configs::broker_entries(&node.shared.settings, &view.image, -1)
            .into_iter()
            .filter(|e| e.source == configs::SOURCE_DYNAMIC_BROKER)
            .collect()),
        ConfigResource::Broker(Some(id)) => {
            let mut entries = configs::broker_entries(&node.shared.settings, &view.image, *id);
            entries.extend(configs::derived_entries(node));
            Ok(entries)
        }
    }
}

fn show(e: Effective, version: i16, request: &DescribeConfigsRequest) -> DescribeConfigsResourceResult {
    let mut out = DescribeConfigsResourceResult::default()
        .with_name(StrBytes::from_static_str(e.entry.name))
        .with_value(Some(StrBytes::from_string(e.value)))
        .with_read_only(matches!(e.entry.scope, Scope::Broker { dynamic: false }))
        .with_config_source(if e.source == 0 { SOURCE_DEFAULT } else { e.source });
    if request.include_synonyms {
        out.synonyms = e
            .synonyms
            .into_iter()
            .map(|(name, value, source)| {
                DescribeConfigsSynonym::default()
                    .with_name(StrBytes::from_static_str(name))
                    .with_value(Some(StrBytes::from_string(value)))
                    .with_source(source)
            })
            .collect();
    }
    if version >= 3 {
        out.config_type = e.entry.kind.code();
        if request.include_documentation {
            out.documentation = Some(StrBytes::from_static_str(e.entry.doc));
        }
    }
    out
}
