package announce

import (
	"context"
	"fmt"

	"github.com/mdlayher/socket"
	"golang.org/x/sys/unix"
)

// outlet is a packet socket that sends on any interface of the namespace it
// was opened in and receives nothing.
type outlet struct {
	conn *socket.Conn
}

// openOutlet opens an outlet. With offload, each frame is sent with a
// virtio-net header in front, from which the kernel completes checksums and
// cuts segments (PACKET_VNET_HDR, packet(7)).
func openOutlet(offload bool) (*outlet, error) {
	// Protocol 0: no packet is ever queued on this socket.
	conn, err := socket.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0, "packet", nil)
	if err != nil {
		return nil, fmt.Errorf("open packet socket: %w", err)
	}
	if offload {
		if err := conn.SetsockoptInt(unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
			_ = conn.Close() // the error that counts is the one below
			return nil, fmt.Errorf("set PACKET_VNET_HDR: %w", err)
		}
	}
	return &outlet{conn: conn}, nil
}

func (o *outlet) send(ctx context.Context, index int, b []byte) error {
	return o.conn.Sendto(ctx, b, 0, &unix.SockaddrLinklayer{Ifindex: index, Halen: 6})
}

func (o *outlet) close() error { return o.conn.Close() }
