// Command vcsim is govmomi's simulator of vCenter, as it is, with an inventory that its flags
// describe. Unlike package vspheretest, it makes no files for the disks of snapshots.
package main

import (
	"crypto/tls"
	"flag"
	"fmt"
	"log"
	"net/url"
	"os"
	"os/signal"

	"github.com/vmware/govmomi/simulator"
)

func main() {
	model := simulator.VPX()
	listen := flag.String("l", "127.0.0.1:8989", "address to listen on")
	user := flag.String("username", "", "user name for the server")
	password := flag.String("password", "", "password of the user")
	flag.IntVar(&model.Datacenter, "dc", model.Datacenter, "number of datacenters")
	flag.IntVar(&model.Cluster, "cluster", model.Cluster, "number of clusters of a datacenter")
	flag.IntVar(&model.ClusterHost, "host", model.ClusterHost, "number of hosts of a cluster")
	flag.IntVar(&model.Host, "standalone-host", model.Host, "number of standalone hosts of a datacenter")
	flag.IntVar(&model.Datastore, "ds", model.Datastore, "number of datastores")
	flag.IntVar(&model.Machine, "vm", model.Machine, "number of VMs of a pool")
	flag.Parse()

	if err := model.Create(); err != nil {
		log.Fatal(err)
	}
	defer model.Remove()
	model.Service.Listen = &url.URL{Host: *listen}
	if *user != "" {
		model.Service.Listen.User = url.UserPassword(*user, *password)
	}
	model.Service.TLS = new(tls.Config)
	model.Service.RegisterEndpoints = true
	server := model.Service.NewServer()
	defer server.Close()
	fmt.Printf("export GOVC_URL=%s GOVC_INSECURE=1\n", server.URL)
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, os.Interrupt)
	<-stop
}
