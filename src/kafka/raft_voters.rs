//! Voters of the metadata quorum: what AddRaftVoter and RemoveRaftVoter share.

use std::{rc::Rc, time::Duration};

use kafka_protocol::ResponseError;
use millrace_cluster::controller::members;
use uuid::Uuid;

use super::errors::Failure;
use crate::{coordinator::controller::propose, node::Node};

/// Makes a node a voter, or ends that, and waits until it holds.
///
/// # Errors
/// [`Failure`]; REQUEST_TIMED_OUT if it is agreed on and does not hold yet.
pub async fn set(
    node: &Rc<Node>,
    cluster_id: Option<&str>,
    voter: i32,
    directory: Uuid,
    votes: bool,
    patience: Duration,
) -> Result<(), Failure> {
    if let Some(id) = cluster_id.filter(|id| !id.is_empty())
        && *id != node.cluster_id()
    {
        return Err(Failure::new(
            ResponseError::InconsistentClusterId,
            format!("this is cluster {}", node.cluster_id()),
        ));
    }
    propose(node, false, move |_, image| {
        members::set_voter(image, voter, directory, votes).map_err(Failure::from)
    })
    .await?;
    let holds = node.router.call(node, 0, move |n| async move {
        let coordinator = n.coordinator();
        let quorum = &coordinator.controller.quorum;
        let holds = async {
            while quorum.with(|q| q.members().0.contains(&voter) != votes) {
                n.host_sleep(Duration::from_millis(20)).await;
            }
            true
        };
        let patience = async {
            n.host_sleep(patience).await;
            false
        };
        futures_lite::future::or(holds, patience).await
    });
    match holds.await? {
        true => Ok(()),
        false => Err(Failure::new(
            ResponseError::RequestTimedOut,
            format!("it is agreed on, and will hold once node {voter} has caught up and a majority would remain"),
        )),
    }
}
