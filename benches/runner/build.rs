//! Code of the two peers, from the same two messages; no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/guest.proto");
    let ping = tonic_build::manual::Method::builder()
        .name("ping")
        .route_name("Ping")
        .input_type("crate::rpc::tonic_peer::Ping")
        .output_type("crate::rpc::tonic_peer::Pong")
        .codec_path("tonic_prost::ProstCodec")
        .build();
    let guest = tonic_build::manual::Service::builder()
        .name("Guest")
        .package("bench")
        .method(ping)
        .build();
    tonic_build::manual::Builder::new().compile(&[guest]);
    let out = std::env::var("OUT_DIR")?;
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .inputs(["proto/guest.proto"])
        .include("proto")
        .rust_protobuf()
        .customize(ttrpc_codegen::Customize {
            async_all: true,
            ..Default::default()
        })
        .run()?;
    // The generator's own mod.rs has inner attributes, which include! does not take.
    std::fs::write(
        format!("{out}/peers.rs"),
        "pub mod guest;\npub mod guest_ttrpc;\n",
    )?;
    Ok(())
}
