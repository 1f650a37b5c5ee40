// Package linux builds what a lab's Linux guest boots from: Debian's cloud
// kernel, unpacked from its package without installing it, and an initramfs of
// this project's own init with the modules that it needs.
//
// Prepare does all of it, in a cache folder, and is quick when it has been done
// before.
package linux
