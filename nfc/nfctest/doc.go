// Package nfctest gives tests a stand-in for the NFC service of an ESXi host, which listens on
// TCP port 902 of a real host:
//
//	h := nfctest.New(t, nfctest.Options{})
//	h.AddDisk("[ds1] web01/web01.vmdk", nfctest.Disk{Content: bytes.NewReader(data), Size: int64(len(data))})
//	ticket := h.Ticket() // for one connection
//
// The host plays the whole way of a connection: the greeting, the first TLS session with its text
// lines, the handshake of 264-byte messages in clear or in a second TLS session, and the frames
// that open, describe and read a disk. [Profile] selects the version of ESXi. Package nfctest
// shares no code with the client in package nfc, so that a test finds a mistake in either.
//
// The host records what a client does wrong. A host from [New] fails its test with
// [Host.Violations].
//
// [Host.On] makes the host misbehave at a step of the dialogue:
//
//	rule := h.On(nfctest.Fault{Step: nfctest.StepRead, Skip: 3, Times: 1, Kind: nfctest.Reset})
//	rule := h.On(nfctest.Fault{Step: nfctest.StepProxy, Connection: 2, Kind: nfctest.Silence})
//	<-rule.Arrived() // the connection waits: cancel the client ...
//	rule.Release()
package nfctest
