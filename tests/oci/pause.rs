//! A container that is paused before it is started, beside runc.

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::Runtime;

#[test]
fn a_created_container_is_paused_and_created_again() {
    let (ours, runc) = (Runtime::new().unwrap(), Runtime::runc().unwrap());
    for runtime in [&ours, &runc] {
        let bundle = Bundle::script("echo ran > /root/ran; exec sleep 1000").unwrap();
        let status = || runtime.state("early").unwrap()["status"].clone();
        runtime.create("early", &bundle).unwrap();
        runtime.ok(&["pause", "early"]).unwrap();
        assert_eq!(status(), "paused");
        assert!(runtime.ok(&["list"]).unwrap().contains("paused"));
        for (line, words) in [
            (&["start", "early"][..], "paused"),
            (&["pause", "early"], ""),
            (&["exec", "early", "true"], "cannot exec in a paused container"),
            (&["delete", "early"], "not stopped: paused"),
        ] {
            let errors = runtime.fails(line).unwrap();
            assert!(errors.contains(words), "{line:?}: {errors}");
        }
        runtime.ok(&["resume", "early"]).unwrap();
        assert_eq!(status(), "created");
        assert!(!bundle.rootfs().join("root/ran").exists());
        runtime.ok(&["start", "early"]).unwrap();
        assert_eq!(status(), "running");
        runtime.ok(&["delete", "--force", "early"]).unwrap();
        // The same with a container that is deleted instead.
        runtime.create("early", &bundle).unwrap();
        runtime.ok(&["pause", "early"]).unwrap();
        runtime.ok(&["delete", "--force", "early"]).unwrap();
    }
    ours.assert_clean().unwrap();
}
