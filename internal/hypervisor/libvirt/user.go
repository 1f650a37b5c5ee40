package libvirt

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"libvirt.org/go/libvirtxml"
)

// userOf is the user and group that libvirt would run a domain's QEMU as: those
// of its own label, or of libvirtd's configuration. Where libvirtd does not
// separate domains by user, that is root.
func userOf(ctx context.Context, l *link, x *libvirtxml.Domain) (uid, gid int, err error) {
	for i := range x.SecLabel {
		if s := &x.SecLabel[i]; s.Model == "dac" && s.Label != "" {
			return parseUser(s.Label)
		}
	}
	caps, err := capabilities(ctx, l)
	if err != nil {
		return 0, 0, err
	}
	for i := range caps.Host.SecModel {
		m := &caps.Host.SecModel[i]
		if m.Name != "dac" {
			continue
		}
		for _, label := range m.Labels {
			if label.Type == x.Type {
				return parseUser(label.Value)
			}
		}
	}
	return 0, 0, nil
}

// parseUser reads "+UID:+GID".
func parseUser(label string) (uid, gid int, err error) {
	user, group, _ := strings.Cut(label, ":")
	uid, err = strconv.Atoi(strings.TrimPrefix(user, "+"))
	if err == nil {
		gid, err = strconv.Atoi(strings.TrimPrefix(group, "+"))
	}
	if err != nil {
		return 0, 0, fmt.Errorf("libvirt's user of QEMU is %q, which is not +UID:+GID", label)
	}
	return uid, gid, nil
}

// capabilities are what libvirt says of its host.
func capabilities(ctx context.Context, l *link) (*libvirtxml.Caps, error) {
	text, err := call(ctx, l, func(l *link) (string, error) { return l.ConnectGetCapabilities() })
	if err != nil {
		return nil, err
	}
	var caps libvirtxml.Caps
	if err := caps.Unmarshal(text); err != nil {
		return nil, fmt.Errorf("libvirt's capabilities: %w", err)
	}
	return &caps, nil
}
