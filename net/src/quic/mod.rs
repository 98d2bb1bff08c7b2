//! QUIC between nodes: quinn on glommio.
//!
//! [`runtime`] lends quinn this thread's executor, [`tls`] says who may connect, [`endpoint`] binds and connects, [`stream`]
//! carries frames. What the frames say is none of this module's business.

pub mod endpoint;
mod runtime;
pub mod stream;
pub mod tls;

pub use endpoint::{Connection, Endpoint, Handshake, LinkError, bind};
pub use stream::{FrameReceiver, FrameSender};
pub use tls::Credentials;
