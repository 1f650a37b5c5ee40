package announce

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/mdlayher/ethernet"
	"github.com/mdlayher/socket"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// socketBuffer is what the kernel may hold of frames that tapSocket's reader
// has not got to, in bytes.
const socketBuffer = 8 << 20

// largestFrame is that of a tap, 64 KiB of IP, with Ethernet header and tags.
const largestFrame = 64<<10 + 64

// stamps is the value of SO_TIMESTAMPING that asks for the time at which a frame
// came. Unlike SO_TIMESTAMPNS, it does not make up a time for a frame that came
// before the kernel had begun to take it.
const stamps = unix.SOF_TIMESTAMPING_RX_SOFTWARE | unix.SOF_TIMESTAMPING_SOFTWARE

// tapSocket is a packet socket that gets a copy of each frame that a tap is
// given for the guest, also when the tap's own queue is full. The frames that
// come from the guest, and those for other MACs, a filter drops in the kernel.
type tapSocket struct {
	conn *socket.Conn
	b    []byte
	oob  []byte
}

func openTapSocket(index int, mac net.HardwareAddr) (*tapSocket, error) {
	filter, err := toGuestFilter(mac)
	if err != nil {
		return nil, err
	}
	// Protocol 0: nothing comes before the socket is bound.
	conn, err := socket.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0, "packet", nil)
	if err != nil {
		return nil, fmt.Errorf("open packet socket: %w", err)
	}
	err = errors.Join(
		named("filter", conn.SetBPF(filter)),
		named("SO_RCVBUFFORCE", conn.SetsockoptInt(unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, socketBuffer)),
		named("SO_TIMESTAMPING", conn.SetsockoptInt(unix.SOL_SOCKET, unix.SO_TIMESTAMPING_NEW, stamps)),
		named("PACKET_VNET_HDR", conn.SetsockoptInt(unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1)),
		named("PACKET_AUXDATA", conn.SetsockoptInt(unix.SOL_PACKET, unix.PACKET_AUXDATA, 1)),
	)
	if err == nil {
		all := binary.NativeEndian.Uint16([]byte{unix.ETH_P_ALL >> 8, unix.ETH_P_ALL}) // htons
		err = named("bind", conn.Bind(&unix.SockaddrLinklayer{Protocol: all, Ifindex: index}))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("packet socket: %w", err), conn.Close())
	}
	return &tapSocket{conn: conn, b: make([]byte, offloadHeader+largestFrame), oob: make([]byte, 256)}, nil
}

func named(what string, err error) error {
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// toGuestFilter lets pass what leaves this host through the interface for mac.
func toGuestFilter(mac net.HardwareAddr) ([]bpf.RawInstruction, error) {
	eq := func(v uint32) bpf.Instruction { return bpf.JumpIf{Cond: bpf.JumpEqual, Val: v} }
	return link([]step{
		{ins: bpf.LoadExtension{Num: bpf.ExtType}},
		{ins: eq(unix.PACKET_OUTGOING), other: "drop"},
		{ins: bpf.LoadAbsolute{Off: 2, Size: 4}},
		{ins: eq(binary.BigEndian.Uint32(mac[2:])), other: "drop"},
		{ins: bpf.LoadAbsolute{Off: 0, Size: 2}},
		{ins: eq(uint32(binary.BigEndian.Uint16(mac))), other: "drop"},
		{ins: bpf.RetConstant{Val: 1 << 20}},
		{ins: bpf.RetConstant{Val: 0}, label: "drop"},
	})
}

// errUnreadable is one frame that the kernel cannot describe in a virtio-net
// header (a tunnel's segments, say) or that is too large.
var errUnreadable = errors.New("frame of no known form")

// next waits for a frame. It returns it behind its virtio-net header, in a
// buffer that the next call overwrites, with the time at which the tap was
// given it, zero if that is not known.
func (s *tapSocket) next() (b []byte, at time.Time, err error) {
	n, oobn, flags, _, err := s.conn.Recvmsg(context.Background(), s.b, s.oob, 0)
	switch {
	case errors.Is(err, unix.EINVAL):
		return nil, time.Time{}, errUnreadable
	case err != nil:
		return nil, time.Time{}, err
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		return nil, time.Time{}, errUnreadable
	}
	messages, err := unix.ParseSocketControlMessage(s.oob[:oobn])
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("control messages: %w", err)
	}
	b = s.b[:n]
	for _, m := range messages {
		switch {
		case m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SO_TIMESTAMPING_NEW && len(m.Data) >= 16:
			// struct scm_timestamping64, of which the first is the software's.
			at = time.Unix(int64(binary.NativeEndian.Uint64(m.Data)), int64(binary.NativeEndian.Uint64(m.Data[8:])))
		case m.Header.Level == unix.SOL_PACKET && m.Header.Type == unix.PACKET_AUXDATA:
			b = withTag(b, m.Data)
		}
	}
	return b, at, nil
}

// Fields of struct tpacket_auxdata (linux/if_packet.h).
const (
	auxStatus   = 0
	auxControl  = 16 // of the VLAN tag
	auxProtocol = 18
	auxSize     = 20
)

// withTag puts back the VLAN tag that the kernel keeps beside a frame's bytes.
func withTag(b, aux []byte) []byte {
	if len(aux) < auxSize || len(b) < offloadHeader+offIP {
		return b
	}
	status := binary.NativeEndian.Uint32(aux[auxStatus:])
	if status&unix.TP_STATUS_VLAN_VALID == 0 {
		return b
	}
	protocol := uint16(ethernet.EtherTypeVLAN)
	if status&unix.TP_STATUS_VLAN_TPID_VALID != 0 {
		protocol = binary.NativeEndian.Uint16(aux[auxProtocol:])
	}
	return insertTag(b, protocol, binary.NativeEndian.Uint16(aux[auxControl:]))
}

// interrupt ends a waiting next, and all that follow.
func (s *tapSocket) interrupt() error { return s.conn.SetReadDeadline(time.Unix(1, 0)) }

func (s *tapSocket) close() error { return s.conn.Close() }
