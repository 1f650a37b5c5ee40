// Package sys holds the kernel interfaces that golang.org/x/sys/unix does not:
// userfaultfd, PAGEMAP_SCAN, ptrace with register sets and signal masks, pidfd
// information, and the parts of /proc that the agent reads. There is one typed
// wrapper for each call and no policy: what to do with an error is the
// caller's business.
//
// Errors wrap the kernel's errno, so that errors.Is(err, unix.EPERM) works.
package sys
