// Package testenv says for a test what it needs of the machine, and notes what
// it ran on.
//
// A test that finds less than it needs ends in one of two ways. What the
// machine itself lacks (no /dev/kvm, a kernel too old, both found out by
// trying) skips the test everywhere. What somebody could have set up (a
// package, a tool, a permission) skips it on a developer's machine, and fails
// it where CI=true.
//
// The notes are attributes of the test (testing.T.Attr). They show in the
// output of go test -v and -json; test/report counts them.
package testenv

// Attributes of a test, for those who read the output of go test -json.
const (
	// AttrRan says on what a guest of the test ran: KVM, TCG and so on. A test
	// may have several.
	AttrRan = "lmctl.ran"
	// AttrLacks says what the machine lacks that a skipped test needs.
	AttrLacks = "lmctl.lacks"
	// AttrMissing says what was not set up that a skipped test needs.
	AttrMissing = "lmctl.missing"
)

// Values of AttrRan.
const (
	RanKVM       = "kvm"
	RanTCG       = "tcg"
	RanTracker   = "tracker"
	RanQEMU10    = "qemu10"
	RanLibvirt11 = "libvirt11"
)
