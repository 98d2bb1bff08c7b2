//! Certificates for nodes of tests and benchmarks.

use millrace_net::quic::{Credentials, tls::node_name};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

/// Signs certificates.
pub type Ca = CertifiedIssuer<'static, KeyPair>;

/// A new authority.
pub fn ca() -> Ca {
    let mut params = CertificateParams::new(Vec::new()).expect("no names");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("signed")
}

/// Those of a node, and whom it believes.
pub fn credentials(node: i32, signed_by: &Ca, believes: &Ca) -> Credentials {
    let key = KeyPair::generate().expect("a key");
    let params = CertificateParams::new(vec![node_name(node)]).expect("a name");
    let certificate = params.signed_by(&key, signed_by).expect("signed");
    Credentials::from_pem(
        believes.pem().as_bytes(),
        certificate.pem().as_bytes(),
        key.serialize_pem().as_bytes(),
        None,
    )
    .expect("sound")
}
