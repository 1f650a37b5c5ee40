package workload

import "unsafe"

// address is where b begins in this process. It is used as a number only, to
// find b's entry in /proc/self/pagemap.
func address(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }
