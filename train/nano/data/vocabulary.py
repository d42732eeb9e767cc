"""The vocabulary of printed words: common English words of two to eight letters, in lower case."""

from train.nano.data.labels import COLOURS, SHAPES, THINGS

_COMMON = """
able about above across act add afraid after again age ago agree air all alone along also always amazing among and
angry animal answer any area arm army around arrive art ask atlas autumn aunt away axe baby back bad bag bake ball band
bank bar base basket bath beach bean beat beauty become bed before begin behind believe below belt bench best better
between big bird birth bite bitter blanket block blood blow board boat body bone boot border borrow both bottle bottom
bowl box boy brain branch brave break bridge bright bring brother brown brush bucket build burn busy butter button buy
cable call calm camp can captain card care carry case catch cause cave ceiling cell center chain chair chalk chance
change cheap check chest chicken child choose church circus city class clay clean clear clever climb cloth cloud coal
coast coat cold collar color come common copper copy corner cotton cough count country course cousin cover crack cream
cross crowd cry cup curtain curve cut damp dance danger dark date daughter day dear deep desk dinner dirty doctor door
dot double down draw dream drink drive dry dust each ear early earth east easy eat edge eight elbow empty end engine
enjoy enough evening ever every exit eye face factory fall family famous far farm fast father fear feather feel fence
few field fight fill film find finger finish first five flat floor flour flower fly fold food foot forest fork form
four free fresh friend from front fruit full funny garden gate gentle giant girl give glad glass glove go goal goat
gold good grain grand grass gray great ground group grow guest hair half hall hand happy harbor hard hat have head
healthy hear heavy help here hill history hold hole holiday home honey hope hospital hot hotel hour hungry hurry ice
idea if in ink insect inside iron island jacket jam jar jelly job join juice jump just keep kettle kick kind king
kiss kitchen kite knee knife know ladder lake lamp land language large last laugh leaf learn left leg letter library
lift light like line lip list listen little live long look loud love low lucky lunch machine magic make man many map
market mask match me meal measure meat medicine meet memory metal middle minute mirror money month morning mother
mountain mouth move movie museum music my nail name narrow nature near neck needle nest never new night nine no noise
north nose note now number nurse ocean of off office oil old on once one onion open order other out oven over own page
pain paint pair palace paper parent park part party past path peace pen people pepper picture piece pillow pilot pin
pipe place plane plant plate play please pocket poem point police pond pool poor post pot powder present pretty price
print prize promise proud pull pump pupil push queen question quick quiet race radio rail rain reach read ready rest
rice rich ride right river road rock roof room root rope round rule run sad safe sail salt same sand school science
sea season seat second secret see seed seven shade sharp sheep sheet shelf shine shirt shoe shop short shout show
silver simple sing sister six skin skirt sky sleep slow small smart smell smile smoke smooth snow so soap sock soft
soil son song soon soup south space spoon spring stamp stand start station steam step stick stone stop store storm
story straight strange street strong student sugar summer sweet swim table tail take talk tall taste teacher tell ten
thank they thick thin thing think this three throw thumb ticket time tired to today toe together tooth top touch towel
tower town toy travel tree trip true try turn twenty twin two under uncle up us use valley very village visit voice
wait walk wall want war warm wash watch water wave we weather week welcome west wet wheel where whistle white who why
wide wild win wind window winter wire wise wish with woman wood wool word work world write yard year yes you young
zebra zero zoo
"""


def _vocabulary() -> list[str]:
    named = [word for name in (*THINGS, *SHAPES, *COLOURS) for word in name.replace("-", " ").split()]
    return sorted({word for word in (*_COMMON.split(), *named) if 2 <= len(word) <= 8})


VOCABULARY: list[str] = _vocabulary()
