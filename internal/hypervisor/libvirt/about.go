package libvirt

import (
	"context"
	"fmt"
)

// About says which libvirt and QEMU this host has, as libvirt counts versions:
// major × 1000000 + minor × 1000 + micro.
func (d *Driver) About(ctx context.Context) (libvirt, qemu uint64, err error) {
	l, err := d.conn.get()
	if err != nil {
		return 0, 0, err
	}
	if libvirt, err = call(ctx, l, func(l *link) (uint64, error) { return l.ConnectGetLibVersion() }); err != nil {
		return 0, 0, err
	}
	qemu, err = call(ctx, l, func(l *link) (uint64, error) { return l.ConnectGetVersion() })
	return libvirt, qemu, err
}

// VersionWords writes a version as libvirt counts it.
func VersionWords(v uint64) string {
	return fmt.Sprintf("%d.%d.%d", v/1000000, v/1000%1000, v%1000)
}
