// Package api is the protocol between lmctl and agents, and between agents: the
// services are described in lmctlv1/lmctl.proto. This package has the client's
// side ([Dial]) and the one way in which errors cross ([Error]).
package api

//go:generate protoc -I lmctlv1 --go_out=lmctlv1 --go_opt=paths=source_relative --go-grpc_out=lmctlv1 --go-grpc_opt=paths=source_relative lmctl.proto
